"""The registry of mixers, and options that are checked without a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config

from radlads.model import list_variants, validate_options
from radlads.model.mixers.shared.mixer import AttentionShape, low_rank_size
from radlads.model.mixers.shared.registry import find_variant
from radlads.tasks.contracts.errors import UserError

# Width → ranks of decay (iclr too), value residual, gate (2505.03005, appendix).
RANKS = {
    896: (64, 32, 128),
    1536: (64, 64, 224),
    2048: (96, 64, 256),
    3584: (96, 64, 416),
    4096: (128, 96, 480),
    5120: (128, 96, 544),
    8192: (160, 128, 800),
}


# Width → ranks of decay, iclr, value residual, gate by RWKVInside's formulas, of all query heads together.
STOCK = {
    1024: (64, 64, 32, 160),
    2048: (96, 96, 64, 256),
    4096: (128, 128, 96, 480),
    5120: (128, 128, 96, 544),
    6144: (128, 128, 96, 640),
    8192: (160, 160, 128, 800),
}
HXA079 = {
    1024: (96, 64, 32, 96),
    2048: (160, 96, 64, 160),
    4096: (256, 128, 96, 256),
    5120: (288, 128, 96, 320),
    6144: (320, 128, 96, 384),
    8192: (384, 160, 128, 480),
}
HXA07A = {
    1024: (96, 32, 96),
    2048: (160, 64, 160),
    4096: (256, 96, 256),
    5120: (288, 96, 288),
    6144: (320, 96, 320),
    8192: (384, 128, 384),
}
HXA07BC = {
    1024: (256, 128, 32, 256),
    2048: (256, 128, 64, 256),
    4096: (256, 128, 96, 256),
    5120: (288, 128, 96, 288),
    6144: (320, 128, 96, 320),
    8192: (384, 160, 128, 384),
}


def config(width: int = 2048, **changes) -> Qwen3Config:
    return Qwen3Config(hidden_size=width, **{"num_attention_heads": 16, "head_dim": 128, **changes})


@pytest.mark.parametrize("width", RANKS)
def test_ranks_are_the_published_ones(width: int) -> None:
    options = validate_options("rad_rwkv7", {}, config(width))
    assert (options.decay_rank, options.value_rank, options.gate_rank) == RANKS[width]
    assert options.iclr_rank == options.decay_rank


@pytest.mark.parametrize("width", STOCK)
def test_ranks_of_openmose_are_the_published_ones(width: int) -> None:
    """Of the width of the heads, which need not be the model's."""
    model = config(width=640, num_attention_heads=width // 128)

    def ranks(variant: str, *names: str, **options) -> tuple[int, ...]:
        resolved = validate_options(variant, options, model)
        return tuple(getattr(resolved, f"{name}_rank") for name in names)

    all_four = ("decay", "iclr", "value", "gate")
    assert ranks("rwkv7", *all_four) == STOCK[width]
    assert ranks("cxa075", *all_four) == STOCK[width]
    assert ranks("cxa073", *all_four[:3]) == STOCK[width][:3]
    assert ranks("hxa079", *all_four) == HXA079[width]
    assert ranks("hxa079", "key") == ranks("hxa079", "value")
    decay, iclr, value, gate = HXA079[width]
    assert ranks("hxa079", *all_four, rank_floor=256) == (max(256, decay), iclr, value, max(256, gate))
    assert ranks("hxa079", "decay", "gate", rank_floor=256, gate_rank=8) == (max(256, decay), 8)
    assert ranks("hxa07a", "decay", "iclr", "gate") == HXA07A[width]
    assert ranks("hxa07b", *all_four) == ranks("hxa07c", *all_four) == HXA07BC[width]


@pytest.mark.parametrize("width", RANKS)
def test_ranks_of_rad_rwkv6_are_the_published_ones(width: int) -> None:
    options = validate_options("rad_rwkv6", {}, config(width))
    assert (options.decay_rank, options.gate_rank) == (RANKS[width][0], RANKS[width][2])
    assert options.shift_rank == options.decay_rank


def test_ranks_have_a_floor_and_can_be_set() -> None:
    assert low_rank_size(32, 0.5, 1.3) == 32
    assert validate_options("rad_rwkv7", {"gate_rank": 8}, config()).gate_rank == 8


@pytest.mark.parametrize("variant", list_variants())
def test_options_refuse_what_they_do_not_know(variant: str) -> None:
    with pytest.raises(UserError, match="unknown key 'no_such_thing'"):
        validate_options(variant, {"no_such_thing": 1}, config())
    for name in find_variant(variant).Options.model_fields:
        with pytest.raises(UserError, match=f"did you mean '{name}'"):
            validate_options(variant, {name + "x": 1}, config())
        break


def test_wrong_values_are_told_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        validate_options("rad_rwkv7", {"gate_rank": 0}, config())
    assert "gate_rank" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_variant_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'rad_rwkv7'"):
        find_variant("rad_rwkv")


@pytest.mark.parametrize("head_dim", [4, 320])
def test_heads_that_no_kernel_takes_are_refused(head_dim: int) -> None:
    with pytest.raises(UserError, match=f"{head_dim} wide"):
        validate_options("rad_rwkv7", {}, config(head_dim=head_dim))


@pytest.mark.parametrize(
    ("variant", "sizes", "millions"),
    [
        ("hxa079", (6144, 64, 8, 96), 11.5),
        ("cxa073", (6144, 64, 8, 96), 4.4),
        ("rad_rwkv7", (3584, 28, 4, 128), 4.8),
        ("rad_rwkv6", (3584, 28, 4, 128), 17.0),
    ],
)
def test_new_parameters_of_a_layer_are_as_many_as_published(variant: str, sizes: tuple, millions: float) -> None:
    hidden, heads, kv_heads, head_dim = sizes
    biases = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias", "qk_norm"), False)
    shape = AttentionShape(hidden, heads, kv_heads, head_dim, norm_eps=1e-6, **biases)
    options = find_variant(variant).Options().resolve(hidden, heads * head_dim)
    with torch.device("meta"):
        mixer = find_variant(variant).Mixer(shape, options, layer=1, num_layers=4, first=False)
    new = sum(p.numel() for name, p in mixer.named_parameters() if not name.endswith(("_proj.weight", "_proj.bias")))
    assert new / 1e6 == pytest.approx(millions, abs=0.1)
