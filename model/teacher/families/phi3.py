"""Phi-3, 3.5 and 4: q, k and v in one projection, gate and up in another, RoPE on a part of the head, longrope."""

from __future__ import annotations

from radlads.model.teacher.load import TeacherFamily

FAMILY = TeacherFamily(model_type="phi3", qkv="qkv_proj", window="all")
