"""Compile the Triton kernels for a GPU that this machine need not have: the check of them in CI.

Replaces Triton's driver by one that only describes the target, so use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from radlads.kernels.inference import triton_linear as inference_linear
from radlads.kernels.inference import triton_low_rank as inference_low_rank
from radlads.kernels.inference import triton_rows as inference_rows
from radlads.kernels.linear_kl import triton_outer, triton_rows
from radlads.kernels.linear_kl import triton_product as product
from radlads.kernels.linear_kl.rows import RowLosses
from radlads.kernels.mixer_ops import triton_finish, triton_operands, triton_rotate
from radlads.kernels.row_distance import triton_distance
from radlads.kernels.shared.triton_launch import ChunkPlan, power
from radlads.kernels.wkv6 import triton_backward as wkv6_backward
from radlads.kernels.wkv6 import triton_forward as wkv6_forward
from radlads.kernels.wkv6 import triton_op as wkv6_op
from radlads.kernels.wkv7 import (
    triton_backward,
    triton_forward,
    triton_fused_backward,
    triton_fused_forward,
    triton_step,
)
from radlads.kernels.wkv7.triton_fused import MOST_BITS
from radlads.kernels.wkv7.triton_op import TRITON_TYPES
from radlads.kernels.wkv7.triton_tuning import (
    FEWEST_HEADS,
    Fused,
    Wkv7Numerics,
    Wkv7Tuning,
    choose_numerics,
    default_tuning,
    fused_tuning,
    hopper_takes,
)

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_BYTES = {"sm_90": 232448, "gfx942": 65536}


class _Utilities:
    def __init__(self, shared_bytes: int) -> None:
        self.shared_bytes = shared_bytes

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.shared_bytes, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32
        }  # fmt: skip


class _Driver:
    """Describes a machine with one such GPU; launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = _Utilities(SHARED_BYTES["sm_90" if target.backend == "cuda" else "gfx942"])

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


def compile_wkv7(
    name: str,
    K: int,
    V: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    ragged: bool = True,
    tuning: Wkv7Tuning | None = None,
    numerics: Wkv7Numerics | None = None,
) -> dict[str, Any]:
    """Compile every wkv7 kernel for `name`, a key of TARGETS: {kernel: what Triton made}. Raises what Triton raises."""
    target = TARGETS[name]
    driver.set_active(_Driver(target))
    tuning = tuning or default_tuning(K, V, target.backend)
    numerics = numerics or choose_numerics(dtype, target.backend, wide=max(K, V) > 128)
    return {
        kernel.fn.__name__: kernel.warmup(*arguments, grid=(1,), **options)
        for kernel, arguments, options in (
            *_launches(K, V, dtype, ragged, tuning, numerics),
            *_fused_launches(
                K, V, dtype, ragged, fused_tuning(K, V, FEWEST_HEADS, dtype, target.backend, hopper=False)
            ),
            *_hopper_launches(K, V, dtype, ragged, name == "sm_90"),
        )
    }


def compile_rows(name: str, V: int, *, tempered: bool = True) -> dict[str, Any]:
    """Compile the kernel of linear_kl and linear_ce for a vocabulary of V: {kernel: what Triton made}."""
    driver.set_active(_Driver(TARGETS[name]))
    block = min(triton_rows._BLOCK, triton.next_power_of_2(V))
    parts = triton.cdiv(V, block)
    f, x = torch.empty(64), torch.empty(64, dtype=torch.bfloat16)
    i, long = torch.empty(64, dtype=torch.int32), torch.empty(64, dtype=torch.int64)
    shared = {"PARTS": parts, "POWER": triton.next_power_of_2(parts), "BLOCK": block, "LAG": 1, "GRAD": True}
    shared |= {"LABELS": True, "FACTORS": True, "TEMPERED": tempered, "WRAP": True}
    shared |= {"num_warps": triton_rows._WARPS, "launch_cooperative_grid": True}
    if TARGETS[name].backend == "cuda":
        shared["maxnreg"] = triton_rows._REGISTERS
    numbers = (4096, V, V, V, V, 0.5, 0.5, 1.0, 0.1, 0.1, -100)
    kernel, losses = triton_rows.rows_kernel, [f] * len(RowLosses._fields)
    return {
        "kl": kernel.warmup(
            f, f, long, f, x, *losses, f, f, i, *numbers, grid=(1,), TEACHER=True, SMOOTH=False, REVERSE=False, **shared
        ),
        "reverse": kernel.warmup(
            f, f, long, f, x, *losses, f, f, i, *numbers, grid=(1,), TEACHER=True, SMOOTH=False, REVERSE=True, **shared
        ),
        "jsd": triton_rows.jsd_kernel.warmup(
            f, f, long, f, x, f, f, V, V, V, V, 0.5, 0.5, 1.0, 0.5, 0.1, 0.1, BLOCK=block, FACTORS=True, GRAD=True,
            TEMPERED=tempered, SMOOTH=False, WRAP=True, num_warps=triton_rows._WARPS, grid=(1,),
        ),
        "ce": kernel.warmup(
            x, None, long, f, x, *losses, f, f, i, *numbers, grid=(1,), TEACHER=False, SMOOTH=True, REVERSE=False,
            **shared,
        ),
    }  # fmt: skip


def compile_products(V: int, *, tempered: bool = True) -> dict[str, Any]:
    """Compile the products of linear_kl for sm_90: {kernel: what Triton made}."""
    driver.set_active(_Driver(TARGETS["sm_90"]))
    tokens, part, depth, parts = product.TOKENS, product.PART, product.DEPTH, triton.cdiv(V, product.PART)
    f, h, long = torch.empty(64), torch.empty(64, dtype=torch.float16), torch.empty(64, dtype=torch.int64)
    x = TensorDescriptor(torch.empty(tokens, 512, dtype=torch.bfloat16), [tokens, 512], [512, 1], [tokens, depth])
    w = TensorDescriptor(torch.empty(part, 512, dtype=torch.bfloat16), [part, 512], [512, 1], [part, depth])
    u = TensorDescriptor(torch.empty(tokens, part, dtype=torch.float16), [tokens, part], [part, 1], [tokens, part // 4])
    g = TensorDescriptor(x.base, [tokens, 512], [512, 1], [triton_outer.DEPTH, triton_outer.ROWS])
    y = TensorDescriptor(x.base, [tokens, 512], [512, 1], [triton_outer.DEPTH, triton_outer.COLUMNS])
    t = TensorDescriptor(torch.empty(part, 512), [part, 512], [512, 1], [triton_outer.ROWS, triton_outer.COLUMNS // 4])
    tile = {"BM": triton_outer.ROWS, "BN": triton_outer.COLUMNS, "BK": triton_outer.DEPTH, "grid": (1,)}
    tile |= {"num_warps": triton_outer.WARPS, "num_stages": triton_outer.STAGES}
    sizes = {"D": 512, "PARTS": parts, "BM": tokens, "BN": part, "BK": depth, "EVEN": V % part == 0}
    options = {"num_warps": product.WARPS, "num_stages": product.STAGES, "grid": (1,)}
    teacher = {"TEACHER": True, "AGAINST": False, "POWERED": 0, "SMOOTH": False}
    student = {"TEACHER": False, "AGAINST": True, "POWERED": int(tempered), "SMOOTH": False}
    alone = student | {"AGAINST": False, "POWERED": 0, "SMOOTH": True}
    losses = {"PARTS": parts, "POWER": triton.next_power_of_2(parts), "LABELS": True, "TEMPERED": tempered}
    losses |= {"BN": part, "TEACHER": True, "SMOOTH": True, "grid": (1,)}
    gradient = {"PARTS": parts, "BN": part, "TAKEN": 8, "TEACHER": True, "FACTORS": True, "TEMPERED": tempered}
    gradient |= {"POWERED": int(tempered), "SMOOTH": True, "WRAP": True, "grid": (1,)}
    width = parts * part
    numbers = (tokens, V, width, 0.5, 0.5, 0.5, 1.0)
    multiply = product.product_kernel.warmup
    return {
        "teacher": multiply(x, w, u, None, f, *numbers, **sizes, **teacher, **options),
        "student": multiply(x, w, u, h, f, *numbers, **sizes, **student, **options),
        "alone": multiply(x, w, u, None, f, *numbers, **sizes, **alone, **options),
        "outer": triton_outer.outer_kernel.warmup(g, y, t, tokens, part, 512, BEGUN=True, **tile),
        "label": product.label_kernel.warmup(x.base, w.base, long, f, V, 512, 512, D=512, BLOCK=512, grid=(1,)),
        "combine": product.combine_kernel.warmup(
            h, h, long, f, f, f, f, f, f, f, f, V, width, width, 0.5, 0.5, -100, **losses
        ),
        "gradient": product.gradient_kernel.warmup(
            h, h, torch.empty(64, dtype=torch.bfloat16), long, f, f, f, V, width, width, width, 0.5, 0.5, 2.0,
            1.0, 0.1, 0.1,
            **gradient,
        ),
    }  # fmt: skip


def compile_wkv6(
    name: str,
    K: int,
    V: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    ragged: bool = True,
    tuning: wkv6_op.Wkv6Tuning | None = None,
) -> dict[str, Any]:
    """Compile every wkv6 kernel for `name`, a key of TARGETS: {kernel: what Triton made}. Raises what Triton raises."""
    target = TARGETS[name]
    driver.set_active(_Driver(target))
    numerics = wkv6_op.choose_numerics(dtype, target.backend)
    x, f, s = torch.empty(64, dtype=dtype), torch.empty(64), torch.empty(64, dtype=numerics.store)
    where = (torch.empty(64, dtype=torch.int64),) * 2 if ragged else None
    tuning = tuning or wkv6_op.default_tuning(K, V, target.backend)
    by_bf16 = dtype == torch.bfloat16
    plan = ChunkPlan(4096, 64, K, V, tuning.chunk, 4, 128, 512, where, ragged)
    launch = wkv6_op.Launch(plan, by_bf16, tuning, numerics)
    scan, tiles = launch.scan[1], launch.tiles(K)[1]
    sizes = (4096, 128, 64)
    launches = (
        (wkv6_forward.scan_kernel, (x, x, x, s, f, f, *plan.where, *sizes), {**scan, "INITIAL": True}),
        (wkv6_forward.out_kernel, (x, x, x, x, s, x, *plan.where, 4, *sizes), tiles),
        (wkv6_backward.scan_back_kernel, (x, x, x, s, f, f, *plan.where, *sizes), scan),
        (wkv6_backward.values_kernel, (x, x, x, x, s, x, *plan.where, 4, *sizes), tiles),
        (
            wkv6_backward.keys_kernel,
            (x, x, x, x, x, s, s, x, x, x, *plan.where, 4, *sizes),
            {**tiles, "RT": numerics.raw},
        ),
    )
    return {kernel.fn.__name__: kernel.warmup(*given, grid=(1,), **options) for kernel, given, options in launches}


def compile_mixer_ops(name: str, K: int, R: int, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Compile the kernels of mixer_ops and row_distance for `name`, a key of TARGETS: how many were compiled. Heads of
    K, R of them to a kv head. Raises what Triton raises."""
    driver.set_active(_Driver(TARGETS[name]))
    x, f = torch.empty(64, dtype=dtype), torch.empty(64)
    tile = triton_operands.tile_of(K) | {"grid": (1,), "num_warps": 4}
    vectors, made = (4, 5, 8, 11, 12, 13), 0
    for values, keys, scaling in ((0, 0, 0), (2, 0, 0), (1, 1, 1), (2, 0, 2), (3, 0, 0)):
        options = tile | {"G": 4, "R": R, "VALUES": values, "KEYS": keys, "SCALING": scaling}
        grads, numbers = [f if place in vectors else x for place in range(14)], (64, 0.6, 0.5, 0.2)
        triton_operands.operands_kernel.warmup(*[x] * 14, f, *[x] * 4, *numbers, **options)
        triton_operands.operands_backward_kernel.warmup(*[x] * 14, f, *[x] * 4, *grads, *numbers, **options)
        made += 2
    for norm, bonus, gate, out in ((0, 0, 1, 0), (0, 1, 1, 0), (1, 1, 1, 1), (1, 1, 0, 0)):
        options = tile | {"NORM": bool(norm), "BONUS": bool(bonus), "GATE": bool(gate), "OUT": bool(out)}
        grads, numbers = [x, f, f, x, x, x, f, x, x], (64, 4, 0.1, 0.0, 1e-5)
        triton_finish.finish_kernel.warmup(*[x] * 10, *numbers, **options)
        triton_finish.finish_backward_kernel.warmup(*[x] * 10, *grads, *numbers, **options)
        made += 2
    for back in (True, False):
        sizes = {"K": K, "P": K // 2, "BN": 32, "BP": triton.next_power_of_2(K // 4), "REST": 64, "BACK": back}
        triton_rotate.rotate_kernel.warmup(x, x, x, x, 64, 4, 16, 0, **sizes, grid=(1,))
        made += 1
    triton_distance.distance_kernel.warmup(x, x, f, 3584, BLOCK=4096, grid=(1,))
    triton_distance.distance_gradient_kernel.warmup(x, x, f, x, 3584, BLOCK=4096, grid=(1,))
    return made + 2


def compile_inference(name: str, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Compile the kernels of inference for `name`, a key of TARGETS: how many were compiled. Raises what Triton
    raises."""
    driver.set_active(_Driver(TARGETS[name]))
    x, f, made = torch.empty(64, dtype=dtype), torch.empty(64), 0
    for N in (1, 2, 16):
        meta = inference_linear.tiles_of(N, 576) | {"grid": (1,)}
        inference_linear.linear_kernel.warmup(*[x] * 20, 576, 192, 192, 0, 0, 3, 576, **meta)
        inference_linear.gated_kernel.warmup(
            *[x] * 4, 1536, 576, **inference_linear.tiles_of(N, 576, gated=True), grid=(1,)
        )
        sizes = {"N": N, "BN": meta["BN"], "grid": (1,), "num_warps": 4}
        ranks, widths = (64, 64, 32, 0, 128), (576, 576, 576, 0, 576)
        inference_low_rank.first_kernel.warmup(*[x] * 10, f, *ranks, D=576, BR=16, BK=256, **sizes)
        inference_low_rank.second_kernel.warmup(f, *[x] * 10, *ranks, *widths, 513, 3, 4, BR=32, BA=32, **sizes)
        made += 4
    inference_rows.silu_kernel.warmup(x, x, x, 64, BLOCK=2048, grid=(1,), num_warps=8)
    for D in (64, 3584):
        inference_rows.rms_norm_kernel.warmup(x, x, x, 64, 1e-6, D=D, BN=2, BD=triton.next_power_of_2(D), grid=(1,))
    return made + 3


def _fused_launches(
    K: int, V: int, dtype: torch.dtype, ragged: bool, tuning: Fused | None
) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    if tuning is None:
        return
    x, f, q = torch.empty(64, dtype=dtype), torch.empty(64), torch.empty(64, dtype=torch.float16)
    where = (torch.empty(64, dtype=torch.int64),) * 2 if ragged else (None, None)
    C, sizes, by_dot = tuning.chunk, (4096, 128, 64), dtype == torch.bfloat16
    shared = {"K": K, "BK": power(K), "PACKED": ragged, "DT": tl.float16, "IP": "tf32"}
    if driver.active.get_current_target().backend == "hip":
        shared["IP"] = "ieee"
    values, kept = {"V": V, "BV": power(V)}, 2 if tuning.middles_warps else 1
    chunked = {"C": C, "TAIL": ragged, "STORE": True, "CUMULATE_BY_DOT": by_dot}
    yield (
        triton_fused_forward.solve_kernel,
        (x, x, x, x, q, q, f, f, *where, 4, *sizes),
        {**shared, **chunked, "LEVELS": C.bit_length() - 1, "LIMIT": MOST_BITS, "num_warps": tuning.solve_warps},
    )
    yield (
        triton_fused_forward.fused_forward_kernel,
        (*(x,) * 6, q, x, q, f, q, f, f, *where, *sizes),
        {**shared, **chunked, **values, "INITIAL": True, "KEPT": kept}
        | {"STAGES": tuning.forward_stages, "num_warps": tuning.forward_warps},
    )
    gates = tl.bfloat16 if by_dot else tl.float16
    halves = {**shared, **values, "C": C // 2, "WT": gates, "WP": "ieee"}
    yield (
        triton_fused_backward.middles_kernel,
        (x, x, x, x, q, f, q, *where, 4, *sizes),
        {**halves, "num_warps": tuning.middles_warps or 4},
    )
    yield (
        triton_fused_backward.fused_backward_kernel,
        (*(x,) * 6, q, q, x, q, f, q, f, *(x,) * 6, f, *where, *sizes),
        {**halves, "KEPT": kept} | {"STAGES": tuning.backward_stages, "num_warps": tuning.backward_warps},
    )


def _hopper_launches(
    K: int, V: int, dtype: torch.dtype, ragged: bool, here: bool
) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    if not (here and hopper_takes(K, V, dtype)):
        return
    from radlads.kernels.wkv7.hopper_backward import hopper_backward_kernel
    from radlads.kernels.wkv7.hopper_forward import hopper_forward_kernel

    x, f, q = torch.empty(64, dtype=dtype), torch.empty(64), torch.empty(64, dtype=torch.float16)
    where = (torch.empty(64, dtype=torch.int64),) * 2 if ragged else (None, None)
    sizes, BK = (4096, 128, 64), power(K)
    shared = {"K": K, "V": V, "BK": BK, "BV": BK, "PACKED": ragged, "TAIL": ragged, "KEPT": 1 if BK == 64 else 2}
    shared |= {"W": BK // 16, "num_warps": BK // 16}
    yield (
        hopper_forward_kernel,
        (*(x,) * 6, q, x, q, f, q, f, f, *where, *sizes),
        {**shared, "C": 32, "INITIAL": True, "STORE": True},
    )
    for split in (True, False):
        yield (
            hopper_backward_kernel,
            (*(x,) * 6, q, q, x, q, f, q, f, *(x,) * 6, f, *where, *sizes),
            {**shared, "C": 16, "SPLIT": split},
        )


def _launches(
    K: int, V: int, dtype: torch.dtype, ragged: bool, tuning: Wkv7Tuning, kind: Wkv7Numerics
) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    x, f = torch.empty(64, dtype=dtype), torch.empty(64)
    s, t = torch.empty(64, dtype=kind.store), torch.empty(64, dtype=kind.triangle)
    where = (torch.empty(64, dtype=torch.int64),) * 2 if ragged else (None, None)
    C, sizes = tuning.chunk, (4096, 128, 64)
    shared = {"K": K, "V": V, "C": C, "TAIL": ragged, "PACKED": ragged, "IP": kind.precision}
    by_dot = {"CUMULATE_BY_DOT": dtype == torch.bfloat16, "DT": kind.dot}
    power = {"BK": max(16, triton.next_power_of_2(K)), "BV": max(16, triton.next_power_of_2(V))}
    inputs = (x,) * 6
    yield (
        triton_forward.terms_kernel,
        (*inputs, s, s, s, s, f, f, t, *where, 4, *sizes),
        {**shared, **by_dot, **power, "LEVELS": C.bit_length() - 1, "STORE": True}
        | {"TT": TRITON_TYPES[kind.triangle], "num_warps": tuning.terms_warps},
    )
    scan, back = tuning.scan, tuning.back
    yield (
        triton_forward.scan_kernel,
        (s, s, s, s, f, f, x, s, f, f, *where, *sizes),
        {**shared, "BK": power["BK"], "BV": scan.values, "INITIAL": True, "STORE": True, "RT": kind.raw}
        | {"STAGES": scan.stages, "num_warps": scan.warps},
    )
    yield (
        triton_backward.scan_back_kernel,
        (s, s, f, f, x, s, f, f, *where, *sizes),
        {**shared, "BK": power["BK"], "BV": back.values, "RT": kind.raw}
        | {"STAGES": back.stages, "num_warps": back.warps},
    )
    yield (
        triton_backward.values_kernel,
        (*inputs, x, s, s, t, f, f, x, *where, 4, *sizes),
        {**shared, **by_dot, "BK": tuning.values.keys, "BV": tuning.values.values, "num_warps": tuning.values.warps},
    )
    yield (
        triton_backward.keys_kernel,
        (*inputs, x, s, s, f, f, x, x, x, x, x, *where, 4, *sizes),
        {**shared, **by_dot, "BK": tuning.keys.keys, "BV": tuning.keys.values, "RT": kind.dot}
        | {"num_warps": tuning.keys.warps},
    )
    yield (
        triton_step.step_kernel,
        (*inputs, f, x),
        {"K": K, "V": V, "BK": triton.next_power_of_2(K), "BV": min(64, power["BV"]), "num_warps": 4},
    )
