"""Qwen3 (dense): grouped queries, per-head RMSNorm on q and k before RoPE, head_dim set apart from the width."""

from __future__ import annotations

from radlads.model.teacher.load import TeacherFamily

FAMILY = TeacherFamily(
    model_type="qwen3", q_norm="q_norm", k_norm="k_norm", window="layer_types", text_of=("qwen3_vl_text",)
)
