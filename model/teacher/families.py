"""The supported teacher families: one row each, by the `model_type` of their transformers config.

A row lists the differences from Llama's block; family.py explains the fields.
"""

from __future__ import annotations

from radlads.model.teacher.family import TeacherFamily

_ROWS = (
    # Llama, and other models published under this type (TinyLlama, SmolLM, Reka Flash): any RoPE scaling.
    TeacherFamily("llama"),
    # Mistral (7B to Small, Devstral, Magistral): no biases whatever the config, a window in every layer or none.
    TeacherFamily("mistral", window="all"),
    # Ministral 3: as Mistral. Queries are also scaled up slowly beyond the original context, which only softmax needs.
    TeacherFamily("ministral3", window="all"),
    # Phi-3, 3.5 and 4: q, k and v in one projection, gate and up in another, RoPE on a part of the head, longrope.
    TeacherFamily("phi3", qkv="qkv_proj", window="all"),
    # Qwen2 and Qwen2.5 (dense): biases on q, k and v; windows only in the deepest layers, where switched on.
    TeacherFamily("qwen2", window="layer_types", text_of=("qwen2_vl_text", "qwen2_5_vl_text")),
    # Qwen3 (dense): RMSNorm on each head's q and k before RoPE, head_dim set apart from the width.
    TeacherFamily("qwen3", q_norm="q_norm", k_norm="k_norm", window="layer_types", text_of=("qwen3_vl_text",)),
    # Qwen3 with experts: attention as in Qwen3; an MLP is a router and its experts, which stay as they are.
    TeacherFamily("qwen3_moe", q_norm="q_norm", k_norm="k_norm", window="all", text_of=("qwen3_vl_moe_text",)),
    # Gemma 3: norms before and after both blocks, their weights counted from one, scaled embeddings, its own scale of
    # scores, and in windowed layers other rotary frequencies.
    TeacherFamily(
        "gemma3_text",
        mlp_norm="pre_feedforward_layernorm",
        other_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        q_norm="q_norm",
        k_norm="k_norm",
        window="layer_types",
    ),
    # OLMo 2: norms after attention and MLP, none before them; one norm over all heads of q, one over all of k.
    TeacherFamily(
        "olmo2",
        input_norm=None,
        mlp_norm=None,
        other_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        q_norm="q_norm",
        k_norm="k_norm",
    ),
    # OLMo 3: as OLMo 2, with windows in three of four layers and rotary scaling only in the others.
    TeacherFamily(
        "olmo3",
        input_norm=None,
        mlp_norm=None,
        other_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        q_norm="q_norm",
        k_norm="k_norm",
        window="layer_types",
    ),
    # Granite 3 (dense): embeddings, scores, residuals and logits are scaled by numbers of the config.
    TeacherFamily("granite", logit_divisor="logits_scaling"),
    # SmolLM3: every fourth layer has no rotary positions.
    TeacherFamily("smollm3", window="layer_types", rotates=("use_rope",)),
    # GLM-4 (0414): neighbouring channels are rotated, on half of the head; norms before and after both blocks; biases.
    TeacherFamily("glm4", other_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    # Command R7B and A: attention and MLP side by side behind one LayerNorm; neighbouring channels are rotated, in
    # windowed layers alone; scaled logits.
    TeacherFamily(
        "cohere2", mlp_norm=None, window="layer_types", rotates=("sliding_window",), logit_scale="logit_scale"
    ),
    # EXAONE 4: norms after attention and MLP, and on each head's q and k; where layers have windows, only those rotate.
    TeacherFamily(
        "exaone4",
        input_norm=None,
        mlp_norm=None,
        other_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        q_norm="q_norm",
        k_norm="k_norm",
        window="layer_types",
        rotates=("is_sliding", "not sliding_window"),
    ),
    # Qwen3.5, its text part: three of four layers are gated delta nets, which stay as they are; the others have norms
    # on each head's q and k, RoPE on a part of the head, and inside q_proj a gate on attention's output.
    TeacherFamily("qwen3_5_text", q_norm="q_norm", k_norm="k_norm", linear_attention="linear_attn"),
    # Seed-OSS: biases on q, k and v; more heads than the width has room for.
    TeacherFamily("seed_oss"),
)

FAMILIES = {row.model_type: row for row in _ROWS}
"""Model type → its family."""
