"""How long training waits for a checkpoint, how long it takes to be written, and the host memory that it needs.

    python benchmarks/checkpoints.py --shape smollm2-135m --layers 6 --ranks 2
    python benchmarks/checkpoints.py --shape qwen2.5-7b --ranks 4 --device cuda --zero 2 --step-seconds 1.7
    python benchmarks/checkpoints.py --shape qwen2.5-7b --ranks 4 --device cuda --store s3://bucket/prefix

A random model of a public shape trains for a few steps by the product's own engine, and saves: `parts`, as the product
does, where every rank copies and uploads its own slices; `gathered`, the way before it, where the first rank collects
every parameter whole, writes files, and uploads those. Each way runs in processes of its own. Every saved state is of
another step; a number is that of the slowest rank, `later` and `written` the least of all saves but the first. The
disk must hold the state twice, for `gathered` three times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor, distributed, multiprocessing, nn
from training_bench.report import describe_machine
from training_bench.shapes import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef
from radlads.tasks.contracts.recipe.recipe import Finetune
from radlads.tasks.contracts.stages import TRAINING_STAGES
from radlads.tasks.jobs.checkpoints.checkpoint import Checkpoints
from radlads.tasks.jobs.checkpoints.state_slices import MOMENTS
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.train.engines.engine import Engine

WAYS = ("parts", "gathered")
_CONTEXT = 64
_SHARD_BYTES = 2 << 30
_INTERVAL = 500  # the default of `checkpoint_every`
_COLUMNS = (
    "way", "ranks", "ZeRO", "trained", "checkpoint GB", "training waits s: first", "later", "share", "written s",
    "GB/s", "host memory of a rank, most GB",
)  # fmt: skip


class NextToken(nn.Module):
    """An objective: cross entropy of random tokens."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def trainable(self, name: str) -> bool:
        """Everything trains."""
        return True

    def num_labels(self, batch: dict[str, Tensor]) -> int:
        """All tokens but the first."""
        return batch["input_ids"][:, 1:].numel()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, no metrics)."""
        return self.student(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss, {}


class Gathered(Checkpoints):
    """The way before parts: the first rank gets everything, writes it, and uploads it in a thread."""

    def save(self, step: int) -> None:
        """Gather and write; start the upload."""
        self.wait()
        folder = self.job.scratch / "saving"
        if self.job.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        pending: dict[str, Tensor] = {}
        number = 0
        for name, parameter in self.engine.parameters.items():
            for kind, tensor in self._whole(parameter).items():
                if self.job.rank == 0:
                    pending[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            if sum(tensor.nbytes for tensor in pending.values()) >= _SHARD_BYTES:
                save_file(pending, folder / f"state-{number:05d}.safetensors")
                pending, number = {}, number + 1
        if pending:
            save_file(pending, folder / f"state-{number:05d}.safetensors")
        if self.job.rank == 0:
            self._writing = threading.Thread(target=self._upload, args=(folder, step), daemon=True)
            self._writing.start()

    def _whole(self, parameter: Any) -> dict[str, Tensor]:
        if not hasattr(parameter, "_hp_mapping"):
            state = self.engine._adam.state[parameter]
            return {"param": parameter, **{kind: state[kind] for kind in MOMENTS}}
        moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        return {"param": safe_get_full_fp32_param(parameter), **moments}

    def _upload(self, folder: Path, step: int) -> None:
        try:
            self.job.store.commit(self.shelf.key(step), folder, self._manifest(step))
            for old in self.shelf.committed()[self.keep :]:
                self.job.store.delete(self.shelf.key(old))
        except BaseException as error:  # noqa: BLE001 - raised again by wait()
            self._failure = error


def measure_rank(rank: int, options: argparse.Namespace, way: str, work: Path) -> None:
    """One rank: a step, then saves with a step beside each; its numbers go to a file."""
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = distributed.FileStore(str(work / f"group-{way}"), options.ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=group, rank=rank, world_size=options.ranks)
    engine, job = build(options, device, rank, work / way)
    kind = Checkpoints if way == "parts" else Gathered

    def step(number: int) -> float:
        began = time.perf_counter()
        batch = {"input_ids": torch.randint(0, 1000, (1, _CONTEXT))}
        engine.step([batch], {"mixer": 0.0, "rest": 1e-5}, number, stop=False)
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {"waits": [], "written": []}
    host = 0
    step(1)
    with kind(job, engine, seed=1, keep=1) as checkpoints:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
        for number in range(2, 2 + options.saves):
            distributed.barrier()
            began = time.perf_counter()
            checkpoints.save(number)
            seconds["waits"].append(time.perf_counter() - began)
            checkpoints.wait()
            seconds["written"].append(time.perf_counter() - began)
            host = host or memory("VmHWM") - before  # of the first save, whose buffers the product keeps
            step(number)
    trained = sum(parameter.numel() for parameter in engine.parameters.values())
    found = seconds | {"trained": trained, "host": host}
    (work / f"{way}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def build(options: argparse.Namespace, device: torch.device, rank: int, folder: Path) -> tuple[Engine, Job]:
    """The engine of a random model, and a job whose store is the one to measure."""
    settings = dict(SHAPES[options.shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    section = Finetune(tokens=10**6, context=_CONTEXT, batch=options.ranks, micro_batch=1)
    engine = Engine(
        NextToken(model), section, device=device, dtype=dtype, zero_stage=options.zero, offload=options.offload,
        micro_batch=1, num_micro=1,
    )  # fmt: skip
    store = StoreRef(uri=options.store or str(folder / "store"))
    spec = JobSpec(
        stage=TRAINING_STAGES[-1], run="benchmark", recipe="benchmark", digest="0" * 64, spec={}, store=store,
        output_uri=f"{store.uri}/checkpoint-benchmark/{folder.name}", scratch=str(folder / "scratch"),
        resources=JobResources(device=device.type, processes=options.ranks, threads=1),
    )  # fmt: skip
    Path(spec.scratch).mkdir(parents=True, exist_ok=True)
    return engine, Job(spec=spec, rank=rank, local_rank=rank, world_size=options.ranks)


def memory(figure: str) -> int:
    """Bytes of this process: VmRSS is resident now, VmHWM the most so far."""
    found = re.search(rf"{figure}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found.group(1)) * 1024


def row(options: argparse.Namespace, way: str, ranks: list[dict[str, Any]]) -> str:
    """A line of the table. Of each number the rank that is worst."""

    def worst(key: str, save: int) -> float:
        return max(rank[key][save] for rank in ranks)

    size = 12 * ranks[0]["trained"] / 1e9
    later, written = (min(worst(key, save) for save in range(1, options.saves)) for key in ("waits", "written"))
    share = f"{later / (_INTERVAL * options.step_seconds):.2%}" if options.step_seconds else ""
    host = max(rank["host"] for rank in ranks) / 1e9
    zero = "offloaded" if options.offload else str(options.zero)
    cells = [
        way, str(options.ranks), zero, f"{ranks[0]['trained'] / 1e6:,.0f} M", f"{size:.2f}",
        f"{worst('waits', 0):.2f}", f"{later:.2f}", share, f"{written:.2f}", f"{size / written:.2f}", f"{host:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def parse() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="cut the depth")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--saves", type=int, default=3, help="the first allocates memory and is told apart; at least 2")
    parser.add_argument("--step-seconds", type=float, help="of a step of the real training, for the share of the wait")
    parser.add_argument("--store", help="where checkpoints go; default: a folder under --work")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="Markdown file to add to")
    return parser


def main() -> None:
    """Measure each way, and print or add the table."""
    options = parse().parse_args()
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for way in options.ways:
            multiprocessing.spawn(measure_rank, (options, way, Path(folder)), nprocs=options.ranks)
            ranks = [json.loads((Path(folder) / f"{way}-{rank}.json").read_text()) for rank in range(options.ranks)]
            lines.append(row(options, way, ranks))
            shutil.rmtree(Path(folder) / way)
    text = describe_machine(" ".join(["python", "benchmarks/checkpoints.py", *sys.argv[1:]])) + "\n"
    text += "\n".join(lines) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        with options.out.open("a", encoding="utf-8") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
