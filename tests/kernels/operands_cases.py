"""Cases of wkv7_operands, and what is compared of them; shared by the tests on the CPU, interpreted and on a GPU."""

from dataclasses import dataclass

import torch

from radlads.kernels.mixer_ops import Residual

NAMES = ("k", "v", "w_low", "a_low", "w0", "a0", "v_first", "v_low", "v0", "k_first", "k_low", "k0")


@dataclass(frozen=True)
class Case:
    """values, keys: the level of the residual, or None."""

    name: str
    B: int = 2
    T: int = 19
    G: int = 2
    R: int = 2
    K: int = 16
    values: str | None = None
    keys: str | None = None
    log_log: bool = False


CASES = [
    Case("rad_rwkv7", values="heads"),
    Case("rad_rwkv7, its first layer"),
    Case("hxa079", values="kv", keys="kv"),
    Case("hxa079 as published", values="kv", keys="kv", log_log=True),
    Case("as many kv heads", G=3, R=1, values="heads"),
    Case("one kv head, a size that is no power of two", G=1, R=7, K=24, values="kv"),
    Case("more tokens than a block", B=1, T=70, values="heads", keys="kv"),
    Case("one token", B=1, T=1, values="heads"),
]


def make(case, dtype, *, as_type=None, device="cpu"):
    """(inputs in the order of NAMES as far as the case has them, options without residuals)."""
    generator = torch.Generator().manual_seed(1)
    B, T, G, R, K = case.B, case.T, case.G, case.R, case.K

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(as_type or dtype)
        return x.to(device).requires_grad_()

    inputs = [normal(B, T, G, K), normal(B, T, G, K)]
    inputs += [normal(B, T, G * R * K), normal(B, T, G * R * K), normal(1, 1, G * R * K), normal(1, 1, G * R * K)]
    for level in (case.values, case.keys):
        heads = G * R if level == "heads" else G
        one = [normal(B, T, heads, K), normal(B, T, heads * K), normal(1, 1, heads * K)]
        inputs += one if level else [None] * 3
    return inputs, {"log_log": case.log_log}


def outputs_and_gradients(operator, inputs, options):
    """Name → output, and "d name" → gradient of a fixed weighted sum of all outputs."""
    values, keys = (None if inputs[i] is None else Residual(*inputs[i : i + 3]) for i in (6, 9))
    found = operator(*inputs[:6], values=values, keys=keys, **options)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in found]
    torch.autograd.backward(list(found), weights)
    gradients = {f"d {name}": x.grad for name, x in zip(NAMES, inputs, strict=True) if x is not None}
    return found._asdict() | gradients


def compile_operands(name, K, R, dtype=torch.bfloat16):
    """Compile both kernels for `name`, a key of offline.TARGETS, as the mixers use them. Raises what Triton raises;
    changes Triton's driver, so for a process of its own."""
    import triton
    from triton.runtime.driver import driver

    from radlads.kernels.mixer_ops import triton_operands as form
    from radlads.kernels.shared import offline

    driver.set_active(offline._Driver(offline.TARGETS[name]))
    x, wide = torch.empty(64, dtype=dtype), torch.empty(64)
    inputs = [x] * 12
    for values, keys, log_log in ((0, 0, False), (2, 0, False), (1, 1, True)):
        BK = triton.next_power_of_2(K)
        meta = {"G": 4, "R": R, "K": K, "BK": BK, "BT": max(1, min(32, 2048 // BK))}
        meta |= {"VALUES": values, "KEYS": keys, "LOG_LOG": log_log, "num_warps": 4}
        outs = [wide, x, x, x, x]
        grads = [x] * 4 + [wide] * 2 + [x, x, wide] * 2
        form.operands_kernel.warmup(*inputs, *outs, 64, 0.6, 0.5, grid=(1,), **meta)
        form.operands_backward_kernel.warmup(*inputs, *outs, *grads, 64, 0.6, 0.5, grid=(1,), **meta)
