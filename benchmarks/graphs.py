"""Training passes as CUDA graphs: do they record, are they the same, how fast are they, and where does memory go.

    python benchmarks/graphs.py                                          # SmolLM2-135M, 48 × 512 and 96 × 512, one GPU
    python benchmarks/graphs.py --shape tiny --device cpu --micro-batch 2 --context 16    # a rehearsal, without graphs

Teacher and student have random weights and live on the device; no job is started. Every part is reported as soon as it
is done, and one that fails is told with its traceback while the others go on:

1. an eager pass: time, peak memory a token, and what autograd keeps of a token, by shape;
2. the rehearsal: a place where the host waits for the GPU, which no graph can record;
3. recording, and five replays against eager passes: losses and gradients, beside two eager runs against each other;
4. whole steps with the optimizer: tokens a second and memory a token.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from training_bench.case import SECTIONS, Case
from training_bench.inputs import teacher_config
from training_bench.shapes import SHAPES
from transformers import AutoModelForCausalLM

from radlads.model.student.load import build_student
from radlads.model.training.fused_modules import fuse_modules
from radlads.model.training.objectives import build_objective
from radlads.model.training.recompute import recompute_cheap
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec
from radlads.tasks.contracts.stages import DISTILL
from radlads.tasks.jobs.process_group import join_group
from radlads.tasks.jobs.train.engines.pass_graphs import NUM_EAGER, PassRecorder
from radlads.tasks.jobs.train.engines.replicated_engine import ReplicatedEngine

logger = logging.getLogger("graphs")

RATES = {"mixer": 1e-4, "rest": 1e-5}
_TOP = 16


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="cut the depth")
    parser.add_argument("--variant", default="rad_rwkv7")
    parser.add_argument("--stage", choices=list(SECTIONS), default=DISTILL.name)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, nargs="*", default=[48, 96])
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


class Bench:
    """One case: a shape, a micro-batch, and whether it recomputes what is cheap."""

    def __init__(self, options: argparse.Namespace, micro_batch: int, *, selective: bool) -> None:
        self.options, self.micro_batch, self.selective = options, micro_batch, selective
        self.device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
        self.on_gpu = options.device == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.case = Case(
            options.shape, options.stage, options.layers, options.variant, context=options.context,
            micro_batch=micro_batch, batch=micro_batch, steps=options.steps, warmup=NUM_EAGER + 2,
            device=options.device, checkpoint=False,
        )  # fmt: skip
        self.tokens = micro_batch * options.context

    def engine(self, *, graphs: bool) -> ReplicatedEngine:
        """A fresh engine; equal ones at each call."""
        torch.manual_seed(0)
        config, options = teacher_config(self.case), self.options
        with self.device:
            teacher = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval().requires_grad_(False)
            student = build_student(
                config, variant=options.variant, options={}, attention_layers=(), attention_rope=False
            ).to(self.dtype)
        for network in (teacher, student):
            fuse_modules(network, self.device)
        if self.selective:
            recompute_cheap(student)
        section = self.case.section()
        spec = TrainSpec(objective=options.stage, section=section, teacher=TeacherRef(path="x", fingerprint="y"))
        objective = build_objective(spec, student, teacher)
        recorder = partial(PassRecorder, self.device) if graphs else None
        return ReplicatedEngine(
            objective, section, device=self.device, dtype=self.dtype, micro_batch=self.micro_batch, num_micro=1,
            make_recorder=recorder, strict=True,
        )  # fmt: skip

    def batch(self, number: int) -> dict[str, Tensor]:
        """Random tokens on the CPU."""
        generator = torch.Generator().manual_seed(number)
        vocabulary = SHAPES[self.options.shape]["vocab_size"]
        return {
            "input_ids": torch.randint(0, vocabulary, (self.micro_batch, self.options.context + 1), generator=generator)
        }

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def eager_pass(self) -> None:
        """Part 1."""
        engine = self.engine(graphs=False)
        engine.objective.train()
        engine._pass(self.batch(0), 1.0)  # compiles
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        began = time.perf_counter()
        engine._pass(self.batch(1), 1.0)
        self.wait()
        seconds = time.perf_counter() - began
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() / self.tokens
            logger.info(
                "eager pass: %.0f ms, %.0f tokens/s, peak %.0f B/token", seconds * 1e3, self.tokens / seconds, peak
            )
        self._kept(engine)

    def _kept(self, engine: ReplicatedEngine) -> None:
        known = {tensor.untyped_storage().data_ptr() for tensor in engine.objective.parameters()}
        known |= {tensor.untyped_storage().data_ptr() for tensor in engine.objective._teacher[0].parameters()}
        kept: dict[int, tuple[int, str]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kind = f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape))}"
                kept.setdefault(storage.data_ptr(), (storage.nbytes(), kind))
            return tensor

        batch = {name: value.to(self.device) for name, value in self.batch(2).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = engine.objective(batch)
        by_kind: Counter[str] = Counter()
        for size, kind in kept.values():
            by_kind[kind] += size
        total = sum(by_kind.values()) / self.tokens
        logger.info("autograd keeps %.0f B/token:", total)
        for kind, size in by_kind.most_common(_TOP):
            logger.info("    %8.0f  %s", size / self.tokens, kind)
        del loss

    def rehearsal(self) -> None:
        """Part 2."""
        engine = self.engine(graphs=True)
        engine.objective.train()
        for number in range(NUM_EAGER):
            engine._pass(self.batch(number), 1.0)
        self.wait()
        logger.info("the host waits nowhere in a pass")

    def recording(self) -> None:
        """Part 3."""
        count = NUM_EAGER + 5
        expected = list(self._passes(count, graphs=False))  # one engine at a time: each pass needs most of the memory
        worst = []
        for graphs in (False, True):
            loss_apart = gradient_apart = 0.0
            for (loss, gradient), (other, theirs) in zip(expected, self._passes(count, graphs=graphs), strict=True):
                loss_apart = max(loss_apart, abs(other - loss) / abs(loss))
                gradient_apart = max(gradient_apart, float((theirs - gradient).norm() / gradient.norm()))
            worst += [loss_apart, gradient_apart]
            free_memory()
        logger.info(
            "largest relative differences of loss and gradient over %d passes: eager against eager %.1e, %.1e; "
            "graph against eager %.1e, %.1e",
            count,
            *worst,
        )

    def _passes(self, count: int, *, graphs: bool) -> Iterator[tuple[float, Tensor]]:
        """(loss, gradient) of each of the first passes of a fresh engine."""
        engine = self.engine(graphs=graphs)
        engine.objective.train()
        for number in range(count):
            values = engine._pass(self.batch(number), 1.0)
            yield float(values["loss"]), engine._sum.clone()
            engine._sum.zero_()

    def steps(self, *, graphs: bool) -> None:
        """Part 4."""
        engine, warmup = self.engine(graphs=graphs), self.case.warmup
        for number in range(self.case.num_steps):
            if number == warmup:
                self.wait()
                began = time.perf_counter()
                if self.on_gpu and not graphs:
                    torch.cuda.reset_peak_memory_stats()
            engine.objective.begin_step(number)
            result = engine.step([self.batch(number)], RATES, number + 1, stop=False)
        self.wait()
        seconds = (time.perf_counter() - began) / self.options.steps
        text = ""
        if self.on_gpu:
            # What a graph works with is reserved for it; allocated it was while it was recorded.
            text = f", allocated at most {torch.cuda.max_memory_allocated() / self.tokens:.0f} B/token"
            text += f", reserved {torch.cuda.memory_reserved() / self.tokens:.0f} B/token"
        logger.info(
            "steps, graphs %s: %.1f ms, %.0f tokens/s%s; last loss %.5f",
            "on" if graphs else "off",
            seconds * 1e3,
            self.tokens / seconds,
            text,
            result.metrics["loss"],
        )


def free_memory() -> None:
    """Return what earlier engines held to the device, and forget its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(name: str, part: Callable[[], None]) -> bool:
    """Run a part and report how it failed; whether it did not."""
    try:
        part()
    except Exception:  # noqa: BLE001 - the other parts tell more
        logger.error("%s FAILED\n%s", name, traceback.format_exc())
        return False
    finally:
        free_memory()
    return True


def main() -> int:
    """Run the parts; 1 if one failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    options = parse()
    join_group(torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu"), 0, 1)
    fine = []
    for micro_batch in options.micro_batch:
        for selective in (False, True):
            bench = Bench(options, micro_batch, selective=selective)
            logger.info("== %d × %d tokens%s", micro_batch, options.context, ", selective" if selective else "")
            fine.append(attempt("the eager pass", bench.eager_pass))
            if bench.on_gpu:
                fine += [attempt("the rehearsal", bench.rehearsal), attempt("recording", bench.recording)]
                fine.append(attempt("steps with graphs", partial(bench.steps, graphs=True)))
            fine.append(attempt("steps without graphs", partial(bench.steps, graphs=False)))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
