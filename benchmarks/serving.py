"""A converted model beside its teacher where people use them: time to read a prompt, to write, and memory.

    python3 benchmarks/serving.py --shape qwen3-1.7b [--variant rad_rwkv7] [--keep 3 7] [--out FILE] [--quick]

Makes a random-weight teacher of a public shape, converts and exports it, and loads both with transformers in one
process: the student as an exported folder with its own code, the teacher with its best attention. Both decode by
replaying a CUDA graph: the student's generate() does so by itself; the teacher's keys and values lie in tensors of the
final length (a static cache), which transformers' own static cache does not record without a compiler. Each row is
measured for both models, one after the other, before the next row. Prefill is the time of generate() to its first
token, decode the median step after it. Watts are the board's, read after the last step.
Results: FILE.json, a table FILE.md and, with matplotlib, FILE.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from serving_table import draw, write_table
from training_bench.shapes import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from radlads.model.convert.transplant import transplant
from radlads.model.student.decoding.recorder import CudaRecorder
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student
from radlads.tasks.jobs.judge.batching.recorded_decoding import continue_recorded

say = logging.getLogger("serving").info
# batch, prompt: what is read; and batch, text so far: what is continued.
PREFILL = ((1, 1024), (1, 4096), (1, 16384), (1, 65536), (1, 131072), (8, 4096), (32, 1024), (32, 8192))
DECODE = ((1, 1024), (1, 16384), (1, 65536), (8, 4096), (32, 1024), (32, 8192))
LARGEST_AFTER = 16384
NEW = 64
REPEATS = 3


class Clock(BaseStreamer):
    """Notes when each token is on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def make_models(options: argparse.Namespace, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel, Any]:
    """(teacher, exported student loaded by its own code, the same student of the package), in bf16."""
    shape = dict(SHAPES[options.shape])
    shape |= {"num_hidden_layers": options.layers} if options.layers else {}
    shape["max_position_embeddings"] = max(shape["max_position_embeddings"], 2**18)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with torch.device(options.device):
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        student = build_student(
            config, variant=options.variant, options={}, attention_layers=tuple(options.keep), attention_rope=False
        )
    transplant(teacher, student.to(torch.bfloat16))
    export_student(student.eval(), None, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    return teacher, loaded.to(options.device).eval(), student


def generate(model: PreTrainedModel, ids: torch.Tensor, new: int) -> list[float]:
    """When the call began, and when each new token was there."""
    clock = Clock()
    clock.put(ids)
    mask = torch.ones_like(ids)
    if new > 1 and ids.is_cuda and not hasattr(model, "mixers"):
        recorder = partial(CudaRecorder, ids.device)
        if continue_recorded(model, ids, mask, new, None, recorder, clock.put) is None:
            raise RuntimeError("the teacher's steps were not recorded")
        return clock.times
    with torch.no_grad():
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None, streamer=clock)
    return [clock.times[0], *clock.times[2:]]


def measured(run: Callable[[], dict[str, float]], *, once: bool = False) -> dict[str, float] | None:
    """Medians of `run` after a warm-up, or what it gives once, with peak memory; None: it does not fit."""
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = [run()]
        if not once:
            found = [run() for _ in range(REPEATS)]
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return None
    result = {name: statistics.median(one[name] for one in found) for name in found[0]}
    if on_gpu:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def prefill(model: PreTrainedModel, batch: int, length: int) -> dict[str, float] | None:
    ids = torch.randint(0, 1000, (batch, length), device=model.device)

    def run() -> dict[str, float]:
        start, first = generate(model, ids, 1)
        return {"seconds": first - start, "tokens_per_second": batch * length / (first - start)}

    return measured(run)


def decode(model: PreTrainedModel, batch: int, length: int, *, once: bool = False) -> dict[str, float] | None:
    ids = torch.randint(0, 1000, (batch, length), device=model.device)

    def run() -> dict[str, float]:
        times = generate(model, ids, NEW)
        watts = read_power(model.device)
        step = statistics.median(b - a for a, b in pairwise(times[1:]))
        used = {} if watts is None else {"watts": watts}
        return {"step_ms": step * 1e3, "tokens_per_second": batch / step, **used}

    result = measured(run, once=once)
    forget(model)
    return result


def largest(model: PreTrainedModel, length: int, most: int) -> dict[str, float] | None:
    """Tokens a second of the largest batch, by halving, that decodes after `length` tokens: read once, since that takes
    minutes; the median step needs no second time."""
    batch = most
    while batch:
        found = decode(model, batch, length, once=True)
        if found is not None:
            return found | {"batch": float(batch)}
        batch //= 2
    return None


def read_power(device: torch.device) -> float | None:
    """The board's power now, in watts; None where it cannot be read."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.power_draw(device) / 1000
    except (ImportError, ModuleNotFoundError, RuntimeError, AttributeError):
        return None


def forget(model: PreTrainedModel) -> None:
    """Free recorded steps: they hold states, and keys and values."""
    if hasattr(model, "forget_recordings"):
        model.forget_recordings()


def same_tokens(student: PreTrainedModel, package: PreTrainedModel) -> dict[str, float]:
    """Graph and eager, exported and package: the share of equal greedy tokens, and the distance of logits from fp32."""
    ids = torch.randint(0, 1000, (2, 200), device=student.device)
    settings = {"do_sample": False, "max_new_tokens": 48, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        graphed = student.generate(ids, **settings)
        eager = student.generate(ids, **settings, disable_compile=True)
        ours = package.generate(ids, **settings, disable_compile=True)
        logits = [model(ids).logits.float() for model in (student, package)]
        wide = package.float()(ids).logits
        package.bfloat16()
    error = [((x - wide).norm() / wide.norm()).item() for x in logits]
    return {
        "graph_is_eager": (graphed == eager).float().mean().item(),
        "exported_is_package": (eager == ours).float().mean().item(),
        "error_of_exported": error[0],
        "error_of_package": error[1],
    }


def rows(options: argparse.Namespace, models: dict[str, PreTrainedModel]) -> Iterator[dict[str, Any]]:
    """Row by row: what was measured, of both models."""
    kinds: list[tuple[str, Any, Any]] = [("prefill", prefill, PREFILL), ("decode", decode, DECODE)]
    for kind, measure, cases in kinds:
        for batch, length in cases:
            if length > options.longest or batch * length > options.most_tokens:
                continue
            yield {"kind": kind, "batch": batch, "length": length} | {
                name: measure(model, batch, length) for name, model in models.items()
            }
    after = min(LARGEST_AFTER, options.longest)
    if not options.quick:
        yield {"kind": "largest batch", "length": after} | {
            name: largest(model, after, options.most_rows) for name, model in models.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-1.7b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--variant", default="rad_rwkv7")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="layers that stay attention")
    parser.add_argument("--longest", type=int, default=131072, help="leave out rows with longer texts")
    parser.add_argument("--most-tokens", type=int, default=2**19, help="leave out rows with more tokens in all")
    parser.add_argument("--most-rows", type=int, default=512, help="of the largest batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="without the largest batch")
    parser.add_argument("--out", type=Path, default=Path("serving"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        teacher, student, package = make_models(options, Path(folder))
        told = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": " ".join(["python3", *sys.argv]),
            "weights_gib": {
                name: sum(x.nbytes for x in model.parameters()) / 2**30
                for name, model in (("teacher", teacher), ("student", student))
            },
            "same": same_tokens(student, package),
            "rows": [],
        }
        say(json.dumps(told["same"]))
        del package
        for row in rows(options, {"teacher": teacher, "student": student}):
            told["rows"].append(row)
            say(json.dumps(row))
            options.out.with_suffix(".json").write_text(json.dumps(told, indent=1))
    write_table(told, options.out.with_suffix(".md"))
    draw(told, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
