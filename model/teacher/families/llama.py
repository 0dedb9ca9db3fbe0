"""Llama, and what else is published under its name (TinyLlama, SmolLM, Reka Flash): no q/k norms, any RoPE scaling."""

from __future__ import annotations

from radlads.model.teacher.load import TeacherFamily

FAMILY = TeacherFamily(model_type="llama")
