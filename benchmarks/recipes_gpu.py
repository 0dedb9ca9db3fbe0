"""Run shipped recipes at their true width on one GPU, with fewer layers, steps and rows per step.

    python benchmarks/recipes_gpu.py --out benchmarks/results/recipes_gpu.md
    python benchmarks/recipes_gpu.py --recipes hrwkv7-reka-flash-3.1 --layers 2 --steps 1
    python benchmarks/recipes_gpu.py --training '{"decay_dtype": "bfloat16"}' --resources '{"zero_stage": 3}'

The teacher has random weights in its published shape. Every stage is the product's own job: plan, tokenize,
transplant, align, choose, distill with every phase, finetune, evaluate, needle, publish; then the exported folder is
loaded and generates. Contexts, micro-batches, bits, losses, LoRA, phases, checkpointing, kept layers and variants are
the recipe's; documents are packed and separated, and one distill has cross-entropy spikes, which no shipped recipe
sets.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module, resources
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from radlads.deployments.twins import large_recipes, recipe_folder
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec
from radlads.tasks.contracts.stages import PUBLISH, STAGES, TRAINING_STAGES, StageInfo, stage_info
from radlads.tasks.graph import convert
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.launchers.launcher import JobCrashed, JobFailed
from radlads.tasks.launchers.local import LocalLauncher
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.pipeline import Pipeline, open_pipeline
from radlads.tasks.plain_runner import PlainRunner, StageRun
from radlads.tasks.stage import Product

logger = logging.getLogger("recipes_gpu")

_REKA = {
    "model_type": "llama", "hidden_size": 6144, "intermediate_size": 19648, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 96, "vocab_size": 100352, "rms_norm_eps": 1e-5, "rope_theta": 8e6,
    "max_position_embeddings": 98304, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
# The published shapes of the recipes' teachers, without the number of layers.
SHAPES: dict[str, dict[str, Any]] = {
    "RekaAI/reka-flash-3": _REKA,
    "RekaAI/reka-flash-3.1": _REKA,
    "Qwen/Qwen3-8B": _QWEN3,
    "Qwen/Qwen3-14B": _QWEN3 | {"hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 40},
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2,
    "Qwen/Qwen2.5-32B-Instruct": _QWEN2
    | {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8},
    "Qwen/Qwen2.5-72B-Instruct": _QWEN2
    | {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8},
}
PEAK = "peak-bytes.txt"


@dataclass
class Row:
    """One stage of one recipe."""

    recipe: str
    stage: str
    seconds: float
    peak_gib: float
    numbers: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)


def cut_recipe(raw: dict[str, Any], folder: Path, *, layers: int, steps: int) -> dict[str, Any]:
    """A recipe at its own sizes with few layers, and few steps of two micro-batches; teacher and data are in
    `folder`."""
    student = dict(raw["student"])
    kept = student.get("attention_layers")
    if isinstance(kept, dict):
        probe = {"lengths": [64], "documents": 4, "heldout_tokens": 128, "context": 128}
        student["attention_layers"] = kept | {"count": 1, "recall": probe}
    elif kept:
        student["attention_layers"] = [layers // 2]
    texts = {"kind": "files", "paths": [str(folder / "stories.txt")], "separator": "<|endoftext|>"}
    chats = {"kind": "files", "paths": [str(folder / "chat.jsonl")], "messages_field": "messages"}
    cut = {
        "name": raw["name"],
        "teacher": raw["teacher"] | {"path": str(folder / "teacher")},
        "student": student,
        "data": {name: {"sources": [chats if name == "chat" else texts]} for name in raw["data"]},
        "resources": {"device": "auto", "processes": 1, "zero_stage": raw.get("resources", {}).get("zero_stage", 1)},
    }
    cut |= {stage: _cut_section(raw[stage], steps) for stage in TRAINING_STAGES if stage in raw}
    evaluate = raw["evaluate"]
    context = evaluate.get("context", 512)
    cut["evaluate"] = {"data": evaluate["data"], "context": context, "heldout_tokens": 4 * context, "batch": 2}
    lengths = [length for length in raw.get("needle", {}).get("lengths", []) if length <= 8192][:2]
    if lengths:
        haystack = {"haystack": texts["paths"], "haystack_separator": texts["separator"]}
        cut["needle"] = {"lengths": lengths, "depths": [0.5], "batch": 2, **haystack}
    return cut


def _cut_section(section: dict[str, Any], steps: int) -> dict[str, Any]:
    small = section | _sizes(section, {}, steps)
    if "phases" in section:
        small["phases"] = [phase | _sizes(section, phase, steps) for phase in section["phases"]]
        small["tokens"] = sum(phase["tokens"] for phase in small["phases"])
    return small | {"heldout_tokens": small["context"], "reset_at_documents": True}


def _sizes(section: dict[str, Any], phase: dict[str, Any], steps: int) -> dict[str, int]:
    own = section | phase
    micro = own.get("micro_batch", own["batch"])
    batch = min(own["batch"], 2 * min(micro, own["batch"]))
    sizes = {"tokens": steps * batch * own["context"], "batch": batch}
    return sizes if not phase or "batch" in phase else {"tokens": sizes["tokens"]}


def write_inputs(shape: dict[str, Any], folder: Path, layers: int) -> None:
    """A teacher with random weights and the demo's tokenizer, stories, and chats made of them."""
    demo = Path(str(resources.files("radlads.deployments.demo")))
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**shape, **ids, num_hidden_layers=layers, dtype="bfloat16")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            teacher = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder / "teacher")
    text = gzip.decompress((demo / "stories.txt.gz").read_bytes()).decode()
    (folder / "stories.txt").write_text(text, encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as stream:
        for first, second in zip(stories[::2], stories[1::2], strict=False):
            words = (("user", f"Tell me about this. {first}"), ("assistant", second))
            messages = [{"role": role, "content": content} for role, content in words]
            stream.write(json.dumps({"messages": messages}) + "\n")


def convert_recipe(recipe: Path, name: str, work: Path, on_row: Callable[[Row], None]) -> None:
    """Every stage of a recipe, one after the other; on_row is called as each ends."""
    places = {"store": str(work / "store"), "work": str(work / "work"), "tracking": "none"}

    def note(done: StageRun) -> None:
        on_row(_row(name, done.label, done.product, done.seconds, done.request.scratch))

    with open_pipeline(str(recipe), run=name, run_id=name, **places, launcher=ForkLauncher()) as pipeline:
        made = convert(pipeline.recipe, PlainRunner(pipeline, note))
        on_row(_reload(pipeline, name, made[PUBLISH.name]))


class ForkLauncher(LocalLauncher):
    """Jobs are forks of this process, which has imported everything and touched no GPU; lanes share the GPU."""

    def run(
        self, spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
    ) -> None:
        """As Launcher.run, without progress."""
        Path(spec.scratch).mkdir(parents=True, exist_ok=True)
        (Path(spec.scratch) / "job.json").write_text(spec.model_dump_json(), encoding="utf-8")
        if in_a_fork(_execute, spec) != 0:
            ending = Path(spec.scratch) / "exit.json"
            if not ending.is_file():
                raise JobCrashed(f"{spec.stage} crashed and did not say why")
            raise JobFailed(json.loads(ending.read_text(encoding="utf-8"))["message"])

    def hold_devices(self, resources: JobResources, purpose: str) -> AbstractContextManager[None]:
        """Nothing is locked."""
        return nullcontext()


def _execute(spec: JobSpec) -> None:
    reason = execute(import_module(_module(stage_info(spec.stage))).main, Job(spec=spec))
    if torch.cuda.is_initialized():
        (Path(spec.scratch) / PEAK).write_text(str(torch.cuda.max_memory_allocated()), encoding="utf-8")
    sys.exit(0 if reason == "done" else 1)


def _module(stage: StageInfo) -> str:
    return f"radlads.tasks.jobs.{stage.program}"


def in_a_fork(function: Callable[..., None], *arguments: Any) -> int:
    """Exit code of a function in a forked child, with a GPU context of its own, which frees all its memory
    afterwards."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    return child.exitcode if child.exitcode is not None else 1


def _row(recipe: str, stage: str, product: Product, seconds: float, scratch: Path) -> Row:
    metrics = product.manifest.metrics
    names = ("loss", "heldout/loss", "tokens_per_second", "kl", "student/needle", "teacher/needle")
    numbers = {name: float(metrics[name]) for name in names if isinstance(metrics.get(name), int | float)}
    peak = scratch / PEAK
    gib = int(peak.read_text(encoding="utf-8")) / 2**30 if peak.is_file() else 0.0
    row = Row(recipe, stage, seconds, gib, numbers, product.manifest.kernels)
    logger.info("%s %s: %.1f s, %.1f GiB %s %s", recipe, stage, seconds, gib, numbers, row.kernels)
    if not all(map(math.isfinite, numbers.values())):
        raise UserError(f"{recipe} {stage}: not finite: {numbers}")
    return row


def _reload(pipeline: Pipeline, recipe: str, published: Product) -> Row:
    """The exported folder by transformers alone: it generates, and its next token's logits, read with and without a
    cache, differ by no more than bf16's rounding through all layers (0.8 to 0.9 % in what was measured)."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=pipeline.settings.work) as scratch:
        folder = pipeline.store.fetch(pipeline.store.key(published.uri), Path(scratch)) / "model"
        found = Path(scratch) / "reload.json"
        if in_a_fork(_load_and_generate, folder, found) != 0:
            raise UserError(f"{recipe}: the exported folder does not load and generate")
        numbers = json.loads(found.read_text(encoding="utf-8"))
    row = Row(recipe, "reload", time.monotonic() - began, numbers.pop("peak_gib"), numbers)
    logger.info("%s reload: %s", recipe, numbers)
    if not numbers["cached/uncached"] < 3e-2:
        raise UserError(
            f"{recipe}: with a cache the exported model's logits differ by {numbers['cached/uncached']:.3f}"
        )
    return row


def _load_and_generate(folder: Path, found: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("Once upon a time there was a little dog.", return_tensors="pt").input_ids.to(device)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1].float()
        seen = model(ids[:, :-1], use_cache=True).past_key_values
        cached = model(ids[:, -1:], past_key_values=seen, use_cache=True).logits[:, -1].float()
    model.generate(ids, max_new_tokens=8, do_sample=False)
    error = ((whole - cached).norm() / whole.norm()).item()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    found.write_text(json.dumps({"cached/uncached": error, "peak_gib": peak}), encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Markdown table: stages, time, memory, kernels."""
    lines = ["| recipe | stage | seconds | peak GiB | numbers | kernels |", "| :-- | :-- | --: | --: | :-- | :-- |"]
    for row in rows:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.numbers.items())
        kernels = "; ".join(f"{name}: {form}" for name, form in row.kernels.items())
        lines.append(f"| {row.recipe} | {row.stage} | {row.seconds:.1f} | {row.peak_gib:.1f} | {numbers} | {kernels} |")
    return "\n".join(lines)


def hardware() -> str:
    """GPU, versions and date of the run."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout if shutil.which(query[0]) else ""
    gpu = answer.splitlines()[0] if answer else "no GPU"
    return f"{gpu}; torch {torch.__version__}, Python {platform.python_version()}; {datetime.now(UTC):%Y-%m-%d}"


@contextmanager
def workplace(given: str | None) -> Iterator[Path]:
    """A folder for everything, removed afterwards unless it was given; in memory where there is room for it."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        yield Path(folder)


def main() -> int:
    """Run the requested recipes; 1 if one did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", help="names; default: every shipped recipe of a large teacher")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--spikes", nargs="*", default=["prwkv7-reka-flash-3"], help="recipes whose distill gets them")
    parser.add_argument("--twins", action="store_true", help="the recipes' tiny twins instead: a rehearsal on a CPU")
    parser.add_argument("--work", help="folder to keep; default: a temporary one")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--json", type=Path, help="the rows as JSON")
    parser.add_argument("--vocab", type=int, help="entries of the vocabulary; default: the teacher's own")
    parser.add_argument("--lanes", type=int, default=1, help="recipes at a time, on the one GPU")
    parser.add_argument(
        "--training", type=json.loads, default={}, metavar="JSON", help="keys of every training section"
    )
    parser.add_argument("--resources", type=json.loads, default={}, metavar="JSON", help="keys of `resources`")
    options = parser.parse_args()
    known = [name for name, _ in large_recipes()]
    unknown = [name for name in options.recipes or () if name not in known]
    if unknown:
        parser.error(f"no shipped recipe of a large teacher: {', '.join(unknown)}; there are {', '.join(known)}")
    if options.twins and (options.training or options.resources):
        parser.error("--training and --resources change the large recipes; leave out --twins")
    if options.lanes > 1 and (options.twins or options.work):
        parser.error("--lanes has folders of its own and large recipes alone; leave out --twins and --work")
    if min(options.layers, options.steps, options.lanes) < 1:
        parser.error("--layers, --steps and --lanes are numbers of at least 1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # lanes share the GPU's memory
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # this check creates no context, unusable in forks
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # torchao queries the GPU on import
        for module in {_module(stage): None for stage in STAGES.values()}:  # once, before anything forks
            import_module(module)
    if torch.cuda.is_initialized():
        raise SystemExit("an import has taken the GPU, so that no fork could use it")
    names = options.recipes or known
    rows, failed = _lanes(names, options) if options.lanes > 1 else _sequence(names, options)
    text = f"{hardware()}\n\n`python benchmarks/recipes_gpu.py {shlex.join(sys.argv[1:])}`\n\n{table(rows)}\n"
    text += "".join(f"\n**{name} failed:** {why}\n" for name, why in failed.items())
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps({"rows": [vars(row) for row in rows], "failed": failed}), encoding="utf-8")
    return 1 if failed else 0


def _sequence(names: Sequence[str], options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Rows of finished stages, and recipe → why it did not finish."""
    known = dict(large_recipes())
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in names:
        with workplace(options.work) as work:
            try:
                _convert_one(known[name], work, options, rows)
            except Exception as error:  # still write the table of the others
                logger.exception("%s failed", name)
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return rows, failed


def _lanes(names: Sequence[str], options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """As `_sequence`, with the recipes divided among concurrent processes."""
    given = ["--layers", str(options.layers), "--steps", str(options.steps), "--spikes", *options.spikes]
    given += ["--vocab", str(options.vocab)] if options.vocab else []
    given += ["--training", json.dumps(options.training), "--resources", json.dumps(options.resources)]
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        shares = {f"{folder}/{lane}.json": names[lane :: options.lanes] for lane in range(options.lanes)}
        running = [
            subprocess.Popen([sys.executable, __file__, "--recipes", *share, "--json", found, *given])
            for found, share in shares.items()
        ]
        for lane, (found, share) in zip(running, shares.items(), strict=True):
            lane.wait()
            if not Path(found).is_file():
                failed |= dict.fromkeys(share, f"its lane ended with {lane.returncode}")
                continue
            result = json.loads(Path(found).read_text(encoding="utf-8"))
            rows += [Row(**row) for row in result["rows"]]
            failed |= result["failed"]
    return rows, failed


def _convert_one(raw: dict[str, Any], work: Path, options: argparse.Namespace, rows: list[Row]) -> None:
    folder = work / raw["name"]
    folder.mkdir()
    if options.twins:
        convert_recipe(recipe_folder() / f"tiny-{raw['name']}.yaml", raw["name"], folder, rows.append)
        return
    began = time.monotonic()
    shape = SHAPES[raw["teacher"]["path"]]
    cut = cut_recipe(raw, folder, layers=options.layers, steps=options.steps)
    cut["resources"] |= options.resources
    for stage in TRAINING_STAGES:
        if stage in cut:
            cut[stage] |= options.training
    if raw["name"] in options.spikes:
        for phase in cut["distill"].get("phases", [cut["distill"]]):
            phase["ce_spikes"] = {"every": 1, "weight": 0.1}
    shape = shape | ({"vocab_size": options.vocab} if options.vocab else {})
    if in_a_fork(write_inputs, shape, folder, options.layers) != 0:
        raise UserError("the random teacher could not be made")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(cut, sort_keys=False), encoding="utf-8")
    rows.append(Row(raw["name"], "random teacher", time.monotonic() - began, 0.0))
    convert_recipe(recipe, raw["name"], folder, rows.append)


if __name__ == "__main__":
    sys.exit(main())
