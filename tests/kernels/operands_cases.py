"""Cases of the operators of mixer_ops, and what is compared of them; shared by the tests on the CPU, interpreted and on
a GPU."""

from dataclasses import dataclass

import torch

from radlads.kernels.mixer_ops import AddedValues, Bonus, GroupNorm, Residual, StockKeys
from radlads.model.mixers.shared.mixer import AttentionShape, FirstValues
from radlads.model.mixers.shared.registry import find_variant, list_variants
from radlads.model.mixers.shared.rwkv7_design import Rwkv7Mixer

NAMES = ("k", "v", "w_low", "a_low", "w0", "a0", "v_first", "v_low", "v0", "k_first", "k_low", "k0", "k_k", "k_a")
ADDED = 0.2


@dataclass(frozen=True)
class Case:
    """values, keys: the level of the residual, "added", or None."""

    name: str
    B: int = 2
    T: int = 19
    G: int = 2
    R: int = 2
    K: int = 16
    values: str | None = None
    keys: str | None = None
    stock: bool = False
    log_log: bool = False


CASES = [
    Case("rad_rwkv7", values="heads"),
    Case("rad_rwkv7, its first layer"),
    Case("rad_rwkv7, stock keys", values="heads", stock=True),
    Case("hxa079", values="kv", keys="kv"),
    Case("hxa079 as published", values="kv", keys="kv", log_log=True),
    Case("hxa07c", values="added"),
    Case("everything at once", values="added", keys="kv", stock=True, G=1, R=3, K=24),
    Case("as many kv heads", G=3, R=1, values="heads"),
    Case("one kv head, a size that is no power of two", G=1, R=7, K=24, values="kv"),
    Case("more tokens than a block", B=1, T=70, values="heads", keys="kv"),
    Case("one token", B=1, T=1, values="heads"),
]


# Every variant of the family, and options that change its design.
DESIGNS = [(name, {}) for name in list_variants() if issubclass(find_variant(name).Mixer, Rwkv7Mixer)] + [
    ("rad_rwkv7", {"form": "groupnorm"}),
    ("hxa079", {"key_scaling": "log_log_decay", "first_values_gradient": False}),
    ("hxa07a", {"key_scaling": "log_log_decay"}),
    ("rwkv7", {"token_shift": False, "gate": False, "group_norm": False}),
]


@dataclass(frozen=True)
class Finish:
    """gate: what is added to it, or None."""

    name: str
    B: int = 2
    T: int = 19
    H: int = 3
    K: int = 16
    norm: bool = False
    scale: float = 1.0
    bonus: bool = False
    gate: float | None = None
    out_gate: bool = False


FINISHES = [
    Finish("rad_rwkv7", scale=0.25, gate=0.0),
    Finish("rad_rwkv7, groupnorm", norm=True, gate=0.0),
    Finish("hxa079", scale=0.25, bonus=True, gate=0.0),
    Finish("rwkv7", norm=True, bonus=True, gate=0.0),
    Finish("cxa073", norm=True, bonus=True),
    Finish("cxa075", bonus=True, gate=1.0),
    Finish("nothing"),
    Finish("everything, no power of two", K=24, norm=True, scale=0.5, bonus=True, gate=1.0, out_gate=True),
    Finish("more tokens than a block", B=1, T=140, H=2, norm=True, bonus=True, gate=0.0, out_gate=True),
    Finish("one token", B=1, T=1, norm=True, gate=0.0),
]  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """P of K channels turn; apart: every sequence has angles of its own."""

    name: str
    B: int = 2
    T: int = 19
    H: int = 3
    K: int = 16
    P: int = 16
    apart: bool = False


TURNS = [
    Turn("whole heads"),
    Turn("a part of a head", K=24, P=8, apart=True),
    Turn("more rows than a block", T=90, H=7, K=12, P=12, apart=True),
    Turn("one token", B=1, T=1, K=8, P=8),
]


class _Draw:
    """Normal leaves, the same for every dtype: drawn in fp64, rounded to `dtype`, held as `as_type`."""

    def __init__(self, dtype, as_type, device):
        self.generator, self.dtype, self.as_type, self.device = torch.Generator().manual_seed(1), dtype, as_type, device

    def __call__(self, *shape):
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return x.to(self.device, self.as_type or self.dtype).requires_grad_()


def make(case, dtype, *, as_type=None, device="cpu"):
    """(inputs in the order of NAMES as far as the case has them, options without tensors)."""
    normal = _Draw(dtype, as_type, device)
    B, T, G, R, K = case.B, case.T, case.G, case.R, case.K
    A = G * R * K
    inputs = [
        normal(B, T, G, K),
        normal(B, T, G, K),
        normal(B, T, A),
        normal(B, T, A),
        normal(1, 1, A),
        normal(1, 1, A),
    ]
    for level in (case.values, case.keys):
        heads = G * R if level == "heads" else G
        inputs += {
            None: lambda: [None] * 3,
            "added": lambda: [None, normal(B, T, A), None],
        }.get(level, lambda heads=heads: [normal(B, T, heads, K), normal(B, T, heads * K), normal(1, 1, heads * K)])()
    inputs += [normal(1, 1, A), normal(1, 1, A)] if case.stock else [None] * 2
    return inputs, {"log_log": case.log_log}


def outputs_and_gradients(operator, inputs, options):
    """Name → output, and "d name" → gradient of a fixed weighted sum of all outputs."""
    values, keys = (None if inputs[i] is None else Residual(*inputs[i : i + 3]) for i in (6, 9))
    if values is None and inputs[7] is not None:
        values = AddedValues(inputs[7], ADDED)
    stock = None if inputs[12] is None else StockKeys(*inputs[12:])
    found = operator(*inputs[:6], values=values, keys=keys, stock=stock, **options)
    return found._asdict() | _gradients(found, dict(zip(NAMES, inputs, strict=True)))


def make_finish(case, dtype, *, as_type=None, device="cpu"):
    """(y, options with tensors) of wkv7_finish."""
    normal = _Draw(dtype, as_type, device)
    B, T, H, K = case.B, case.T, case.H, case.K
    y = normal(B, T, H, K)
    return y, {
        "norm": GroupNorm(normal(H * K), normal(H * K), K * 1e-5) if case.norm else None,
        "scale": case.scale,
        "bonus": Bonus(*(normal(B, T, H, K) for _ in range(3)), normal(H, K)) if case.bonus else None,
        "gate_BTA": None if case.gate is None else normal(B, T, H * K),
        "gate_base": case.gate or 0.0,
        "out_gate_BTA": normal(B, T, H * K) if case.out_gate else None,
    }


def finish_and_gradients(operator, y, options):
    """As `outputs_and_gradients`, of wkv7_finish."""
    leaves = {"y": y, "gate": options["gate_BTA"], "out_gate": options["out_gate_BTA"]}
    for group in ("norm", "bonus"):
        leaves |= {} if options[group] is None else options[group]._asdict()
    out = operator(y, **options)
    return {"out": out} | _gradients([out], {n: x for n, x in leaves.items() if n != "eps"})


def make_turn(case, dtype, *, as_type=None, device="cpu"):
    """(x, options with tensors) of rotate_heads. The halves of cos and sin differ, as a family's might."""
    normal = _Draw(dtype, as_type, device)
    x, angles = normal(case.B, case.T, case.H, case.K), (case.B if case.apart else 1, case.T, case.P)
    return x, {"cos_BTP": normal(*angles).detach(), "sin_BTP": normal(*angles).detach()}


def turn_and_gradients(operator, x, options):
    """As `outputs_and_gradients`, of rotate_heads."""
    out = operator(x, **options)
    return {"out": out} | _gradients([out], {"x": x})


def make_mixer(variant, options, dtype, *, first=False):
    """A mixer with random parameters, and the inputs [2,19,24] of its `mix` as leaves; it has an output gate."""
    module, normal = find_variant(variant), _Draw(dtype, None, "cpu")
    torch.manual_seed(0)
    shape = AttentionShape(24, 4, 2, 8, True, True, True, False, True, 1e-6, output_gate=True)
    resolved = module.Options.parse(options, variant=variant).resolve(24, 32)
    mixer = module.Mixer(shape, resolved, layer=1, num_layers=4, first=first).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(normal(*parameter.shape), alpha=0.3)
    angle = torch.outer(torch.arange(19.0), 100.0 ** (-torch.arange(0, 8, 2) / 8)).repeat(1, 2)[None].to(dtype)
    design = mixer.design
    v = None if design.first_values == "none" else normal(2, 19, 4 if design.first_values == "heads" else 2, 8)
    k = normal(2, 19, 2, 8) if design.first_keys else None
    return mixer, {
        "x_BTD": normal(2, 19, 24),
        "rope": (angle.cos(), angle.sin()),
        "first": FirstValues() if first else FirstValues(v, k),
    }


def _gradients(found, leaves):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x) for x in found]
    torch.autograd.backward(list(found), weights)
    return {f"d {name}": x.grad for name, x in leaves.items() if x is not None}
