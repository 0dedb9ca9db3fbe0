"""linear_kl and linear_ce on one GPU: errors, memory, and time relative to the matrix products alone.

    python3 benchmarks/linear_kl.py [--out FILE.json] [--tokens 16384] [--width 4096] [--vocabulary 152064]

About a minute. "products" is the time of the products that a case requires, each whole and in bf16: logits of student
and (for KL) teacher, gradient of the hidden states, gradient of the head if it trains; all are timed alternately. Peak
memory excludes the operands; the head's gradient (fp32 while it is summed) is reported separately.
liger-kernel and fla, where they can be imported, are measured on the settings that they share with linear_kl:
temperature 1, no cross entropy.

Needs the package importable as `radlads`.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as functional
import triton
from torch import Tensor

from radlads.kernels.linear_kl import linear_ce, linear_kl
from radlads.kernels.linear_kl.rows import RowLosses, RowSettings
from radlads.kernels.linear_kl.triton_rows import triton_rows
from radlads.kernels.shared.testing import relative_rms

BF16 = torch.bfloat16
GIB = 2**30


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def once(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def in_turns(runs: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each, the second of two calls a round. Timed alternately, in a different order each round:
    a GPU at its power limit slows down as it warms, which would favour the first one."""
    order, shuffled = list(runs), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            once(runs[name])
            times[name].append(once(runs[name]))
    return {name: statistics.median(ms) for name, ms in times.items()}


def draw(N: int, D: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of student and teacher (bf16), labels; logits spread like a language model's."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator, dtype=torch.float32).mul_(scale).to(BF16)

    student = normal(N, D)
    teacher = (student.float() + 0.3 * normal(N, D).float()).to(BF16)
    head = normal(V, D, scale=2.5 * D**-0.5)
    other = (head.float() + 0.1 * D**-0.5 * normal(V, D).float()).to(BF16)
    labels = torch.randint(0, V, (N,), device="cuda", generator=generator)
    labels[::11] = -100
    return student, head, teacher, other, labels


def errors() -> Iterator[dict]:
    """Against fp64 on the same bf16 operands: loss and gradients, rows of two parts and of many."""
    for V in (4000, 50257):
        for tau, teacher_tau, weight in ((1.0, 1.0, 0.0), (2.0, 0.7, 0.5)):
            student, head, teacher, other, labels = draw(700, 128, V)
            leaves = [student.requires_grad_(), head.requires_grad_()]
            wide = [x.detach().double().requires_grad_() for x in leaves]
            z, y = wide[0] @ wide[1].t(), teacher.double() @ other.double().t()
            p, q = (y / teacher_tau).log_softmax(-1), (z / tau).log_softmax(-1)
            plain = functional.kl_div(q, p, log_target=True, reduction="batchmean") * tau**2
            plain = plain + weight * functional.cross_entropy(z, labels)
            exact = torch.autograd.grad(plain, wide)
            for logits in (None, torch.float32, BF16):
                loss, _ = linear_kl(
                    student, head, teacher, other, student_temperature=tau, teacher_temperature=teacher_tau,
                    labels_N=labels, ce_weight=weight, logits_dtype=logits,
                )  # fmt: skip
                found = torch.autograd.grad(loss, leaves)
                yield {
                    "case": f"V={V} temperatures {tau}/{teacher_tau} ce {weight} logits {logits or 'never'}",
                    "loss": relative_rms(loss, plain),
                    "d_hidden": relative_rms(found[0], exact[0]),
                    "d_head": relative_rms(found[1], exact[1]),
                }


def products(hidden: Tensor, head: Tensor) -> dict[str, Callable[[], object]]:
    """The three kinds of product, whole and in bf16."""
    logits = torch.empty(len(hidden), len(head), device="cuda", dtype=BF16)
    torch.mm(hidden, head.t(), out=logits)
    return {
        "logits": lambda: torch.mm(hidden, head.t(), out=logits),
        "d_hidden": lambda: logits @ head,
        "d_head": lambda: logits.t() @ hidden,
    }


def row_kernel(V: int) -> Iterator[dict]:
    """The fused kernel alone: milliseconds and bytes per second on 512 rows."""
    rows = 512
    for dtype in (torch.float32, BF16):
        z, y = (torch.randn(rows, V, device="cuda").to(dtype) for _ in range(2))
        grad = torch.empty(rows, V, device="cuda", dtype=BF16)
        losses = RowLosses(*(torch.zeros(rows, device="cuda") for _ in RowLosses._fields))

        def run(z: Tensor = z, y: Tensor = y, grad: Tensor = grad, losses: RowLosses = losses) -> None:
            for _ in range(8):
                triton_rows(z, y, None, None, grad, RowSettings(kl_factor=1.0), losses)

        ms = in_turns({"rows": run})["rows"] / 8
        moved = rows * V * (2 * dtype.itemsize + 2)
        yield {"case": f"row kernel, logits {str(dtype)[6:]}", "ms": ms, "tb_per_s": moved / ms / 1e9}


def peers(student: Tensor, head: Tensor, teacher: Tensor, other: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Other libraries' forward KL from hidden states, those that can be imported."""
    try:
        from fla.modules.fused_kl_div import fused_kl_div_loss

        yield "fla fused_kl_div_loss", lambda: fused_kl_div_loss(student, teacher, head, other)
    except ImportError as error:
        say(f"fla left out: {error}")
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=1.0)
        yield "liger FusedLinearJSD(beta=0)", lambda: loss(student, head, teacher, other)
    except ImportError as error:
        say(f"liger-kernel left out: {error}")


def beyond(run: Callable[[], object]) -> float:
    """GiB allocated in addition to the initial amount."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def losses(N: int, D: int, V: int) -> Iterator[dict]:
    """All cases, timed alternately with the products alone, which come first."""
    student, head, teacher, other, labels = draw(N, D, V)
    alone = products(student.detach(), head)
    student.requires_grad_()
    trained = head.clone().requires_grad_()
    kl = partial(linear_kl, teacher_hidden_NE=teacher, teacher_head_VE=other)
    both = partial(kl, temperature=2.0, labels_N=labels, ce_weight=0.5)
    ce = partial(linear_ce, labels_N=labels)
    cases: list[tuple[str, Callable, bool, int]] = []
    for kind, matrix in (("frozen", head), ("trained", trained)):
        trains = matrix is trained
        cases += [
            (f"kl, {kind} head", partial(kl, student, matrix), trains, 2),
            (f"kl, labels for its metrics, {kind} head", partial(kl, student, matrix, labels_N=labels), trains, 2),
            (f"kl + ce at temperature 2, {kind} head", partial(both, student, matrix), trains, 2),
            (f"ce, {kind} head", partial(ce, student, matrix), trains, 1),
        ]
    for logits in (torch.float32, BF16):
        name = f"kl, frozen head, {str(logits)[6:]} logits in memory"
        cases.append((name, partial(kl, student, head, logits_dtype=logits), False, 2))
    cases += [(name, loss, True, 2) for name, loss in peers(student, trained, teacher, other)]
    runs: dict[str, Callable[[], object]] = dict(alone)
    memory = {}
    for name, loss, trains, _ in cases:

        def run(loss: Callable = loss, leaves: tuple = (student, trained) if trains else (student,)) -> object:
            found = loss()
            return torch.autograd.grad(found[0] if isinstance(found, tuple) else found, leaves)

        try:
            memory[name] = beyond(run)
        except (RuntimeError, torch.OutOfMemoryError, triton.CompilationError) as error:
            yield {"case": name, "failed": f"{type(error).__name__}: {error}"[:200]}
        else:
            runs[name] = run
        torch.cuda.empty_cache()
    times = in_turns(runs)
    for name in alone:
        yield {"case": f"product: {name}", "ms": times[name]}
    for name, _, trains, count in cases:
        if name not in memory:
            continue
        floor = count * times["logits"] + times["d_hidden"] + (times["d_head"] if trains else 0.0)
        yield {
            "case": name,
            "ms": times[name],
            "products_ms": floor,
            "ratio": times[name] / floor,
            "gib": memory[name],
            "head_gradient_gib": 4 * V * D / GIB if trains else 0.0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=152064)
    options = parser.parse_args()
    shape = (options.tokens, options.width, options.vocabulary)
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    found: dict = {**versions, "shape": shape, "errors": [], "times": []}
    say(" ".join(versions.values()) + f"   N={shape[0]} D={shape[1]} V={shape[2]}")
    for row in errors():
        found["errors"].append(row)
        say(f"{row['case']:56s} " + "  ".join(f"{k} {row[k]:.1e}" for k in ("loss", "d_hidden", "d_head")))
    for row in row_kernel(shape[2]):
        found["times"].append(row)
        say(f"{row['case']:56s} {row['ms']:6.2f} ms  {row['tb_per_s']:.2f} TB/s")
    torch.cuda.empty_cache()
    for row in losses(*shape):
        found["times"].append(row)
        text = row.get("failed") or f"{row['ms']:6.1f} ms"
        if "ratio" in row:
            text += f"  {row['ratio']:.3f} x products {row['products_ms']:.1f}  peak {row['gib']:.2f} GiB"
            text += f", of it head gradient {row['head_gradient_gib']:.2f}"
        say(f"{row['case']:56s} {text}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
