"""Qwen3 with experts: attention as in Qwen3; the MLP of a layer is a router and its experts, which stay as they are."""

from __future__ import annotations

from radlads.model.teacher.load import TeacherFamily

FAMILY = TeacherFamily(
    model_type="qwen3_moe", q_norm="q_norm", k_norm="k_norm", window="all", text_of=("qwen3_vl_moe_text",)
)
