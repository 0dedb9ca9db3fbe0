"""Qwen2 and Qwen2.5 (dense): biases on q, k and v; windows only in the deepest layers, where switched on."""

from __future__ import annotations

from radlads.model.teacher.load import TeacherFamily

FAMILY = TeacherFamily(model_type="qwen2", window="layer_types", text_of=("qwen2_vl_text", "qwen2_5_vl_text"))
