"""Llama 1-3, TinyLlama, SmolLM, Reka Flash and whatever else is published as `llama`: no q/k norms, RoPE of any scaling type."""

from __future__ import annotations

from radlads.model.teacher import TeacherFamily

FAMILY = TeacherFamily(model_type="llama")
