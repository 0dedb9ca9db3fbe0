"""Mistral (7B to Small, Devstral, Magistral): no biases whatever a config says, a window in every layer or none."""

from __future__ import annotations

from radlads.model.teacher.load import TeacherFamily

FAMILY = TeacherFamily(model_type="mistral", window="all")
