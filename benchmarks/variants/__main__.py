"""Convert the demo teacher with every mixer variant at equal tokens; writes one table of results, and JSON lines.

    python benchmarks/variants --out DIR                        # one GPU; --help lists the sizes
    python benchmarks/variants --out DIR --device cpu --quick   # the same code on a CPU, too small to be meaningful

All work is done by the product's own functions, its engine and its steps included, but without a process per stage,
which would take longer than the stage. Data, losses, optimizer, schedules and rates are those of the recipe smoke-pure,
the same for every variant; batches may be larger (--align-batch, --distill-batch), so that a GPU is not idle. There is
no finetune stage, and no checkpoint is kept.

Rows: `default` is a variant's options as new conversions have them, `faithful` those of published weights (defects
included), `close` its start nearer to the teacher where it has the options (decay_shift 1, first-layer shares at -4).
hxa07b without the published defect is hxa07c, so that their default rows differ by nothing.
Units: pure (transplant, align, judge, choose layers, distill, judge), calibrated (align once more, from a calibrated
start), hybrid (a quarter of the layers is softmax again, restored into the pure unit's aligned student as the stage
`choose` does, then distill; a set of layers that several ways choose is run once), control (each layer that no way
chose, restored alike; one seed). So layers chosen by `even` and
`last` are aligned with the others here, which a recipe would not do. Alignment losses are on held-out rows.

Units run in parallel, the most informative first; a failed one is recorded with its reason, and a second run with the
same --out and --work continues where the first stopped. Speeds are measured at the end, with nothing else on the GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from conversion import make_data
from pool import follow_ups, run_units
from rows import NUM_LAYERS, ROWS, Record, Settings, Unit
from table import tables

from radlads.tasks.contracts.recipe.choice import AttentionChoice, RecallProbe, fit_probe, run_tokens
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe

logger = logging.getLogger("variants")
GRACE_SECONDS = 90.0


class Results:
    """The JSON lines and the table made of them, written anew after every unit."""

    def __init__(self, folder: Path, head: str, tokens: dict[str, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        name = "_".join(gpu.lower().replace("nvidia", "").split())
        self.tokens = tokens
        self.lines, self.page, self.head = folder / f"variants_{name}.jsonl", folder / f"variants_{name}.md", head
        text = self.lines.read_text(encoding="utf-8") if self.lines.is_file() else ""
        self.records: list[Record] = [json.loads(line) for line in text.splitlines()]

    def done(self, unit: Unit) -> Record | None:
        """The recorded result of a unit; a failure does not count."""
        return next((r for r in reversed(self.records) if r["key"] == unit.key and "error" not in r), None)

    def add(self, unit: Unit, found: Record) -> None:
        record = {"key": unit.key, "unit": unit.kind, "row": unit.row, "seed": unit.seed, "layers": unit.layers} | found
        self.records.append(json.loads(json.dumps(record)))
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.page.write_text(f"{self.head}\n\n{tables(self.records, ROWS, self.tokens)}\n", encoding="utf-8")


def settings_of(parsed: argparse.Namespace) -> Settings:
    """The recipe with the requested sizes."""
    sizes = {
        "align.tokens": parsed.align_tokens,
        "align.batch": parsed.align_batch,
        "align.micro_batch": parsed.align_batch,
        "distill.tokens": parsed.distill_tokens,
        "distill.batch": parsed.distill_batch,
        "distill.micro_batch": parsed.distill_batch,
        "finetune": None,
        "needle.trials": parsed.trials,
    }
    if parsed.quick:
        small = {"needle.lengths": [64], "evaluate.heldout_tokens": 1024, "evaluate.context": 128}
        sizes |= small | {"align.context": 64, "distill.context": 64, "needle.max_new_tokens": 8}
    recipe: Recipe = load_recipe("smoke-pure", sizes)
    hay = {"haystack": recipe.needle.haystack, "haystack_separator": recipe.needle.haystack_separator}
    if parsed.quick:
        probe = RecallProbe(**hay, lengths=(64,), documents=8, heldout_tokens=512, context=128)
    else:
        choice = AttentionChoice(count=1, choose="recall", recall=RecallProbe(**hay, micro_batch=32))
        probe = fit_probe(choice, num_layers=NUM_LAYERS, tokens=run_tokens(recipe)).recall
    large = tuple(map(int, parsed.large.split("x")))
    return Settings(recipe, probe, parsed.device, parsed.work.absolute(), (large[0], large[1]), parsed.speed_steps)


def describe(parsed: argparse.Namespace, settings: Settings) -> str:
    """The head of the page: date, hardware, command, sizes."""
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else f"CPU, {platform.machine()}"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    sizes = [
        f"{name}: {s.num_steps} steps of {s.batch} × {s.context} = {s.seen_tokens:,} tokens, mixer rate "
        f"{s.mixer_rate.start:g} → {s.mixer_rate.final:g}, rest {s.rest_rate.start:g} → {s.rest_rate.final:g}, "
        f"{s.schedule.kind}"
        for name, s in (("align", settings.recipe.align), ("distill", settings.recipe.distill))
    ]
    needle = settings.recipe.needle
    return "\n".join(
        [
            "# Every variant on the demo teacher, equal tokens" + (" (quick: proves nothing)" if parsed.quick else ""),
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, {gpu}; {said}, Python {platform.python_version()}; commit "
            f"{done.stdout.strip() or 'unknown'}; {'bf16, fp32 masters' if settings.device == 'cuda' else 'fp32'}.",
            "",
            f"    {shlex.join([Path(sys.executable).name, *sys.argv])}",
            "",
            "Recipe smoke-pure without its finetune stage, the same rates for every variant. " + ". ".join(sizes) + ".",
            f"Needle: lengths {list(needle.lengths)}, {len(needle.depths)} depths, {needle.trials} trials; "
            f"{parsed.seeds} seeds (mixers' start and order of the data); cells: mean (each seed). "
            f"{parsed.processes} conversions at a time; speeds alone.",
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the table and its lines, of one set of sizes"
    )
    parser.add_argument("--work", type=Path, default=Path(".radlads/variants"), help="datasets and aligned students")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--budget", type=float, default=330.0, help="seconds after which no new unit is started")
    parser.add_argument("--speed-seconds", type=float, default=60.0, help="the same for the speeds, which come last")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", help="names of rows, comma between; all by default")
    parser.add_argument("--align-tokens", type=int, default=524_288)
    parser.add_argument("--align-batch", type=int, default=16)
    parser.add_argument("--distill-tokens", type=int, default=1_048_576)
    parser.add_argument("--distill-batch", type=int, default=16)
    parser.add_argument("--trials", type=int, default=10, help="of the needle, at each length and depth")
    parser.add_argument("--large", default="32x1024", help="sequences x context of the second speed")
    parser.add_argument("--speed-steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="four rows, one seed, tiny sizes: a check of the code")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.align_tokens, parsed.align_batch, parsed.distill_tokens, parsed.distill_batch = 1024, 4, 1024, 4
        parsed.trials, parsed.seeds, parsed.large, parsed.speed_steps = 5, 1, "4x128", 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    began = time.monotonic()
    rows = [ROWS[name] for name in parsed.rows.split(",")] if parsed.rows else list(ROWS.values())
    if parsed.quick and not parsed.rows:
        rows = [ROWS[name] for name in ("rwkv7", "hxa079", "rad_rwkv7", "rad_rwkv6")]
    settings = settings_of(parsed)
    stages = {"align": settings.recipe.align, "distill": settings.recipe.distill}
    tokens = {name: stage.seen_tokens for name, stage in stages.items()}
    results = Results(parsed.out, describe(parsed, settings), tokens)

    def next_units(unit: Unit, found: Record) -> list[Unit]:
        wanted = (one for one in follow_ups(unit, found) if not (parsed.quick and one.kind == "control"))
        return [one for one in wanted if results.done(one) is None]

    def note(unit: Unit, found: Record) -> list[Unit]:
        results.add(unit, found)
        told = {name: f"{found[name]:.4g}" for name in ("align_final", "kl", "needle", "distill") if name in found}
        said = found.get("error") or f"{found['seconds']} s, {told}"
        logger.info("%5.0f s  %s: %s", time.monotonic() - began, unit.key, said)
        return next_units(unit, found)

    seeds = range(parsed.seeds)
    units = [Unit("teacher_needle"), *(Unit("pure", row.name, seed) for row in rows for seed in seeds)]
    units += [Unit("calibrated", row.name, seed) for row in rows for seed in seeds if row.kind == "default"]
    known = [(unit, results.done(unit)) for unit in units]
    todo = [unit for unit, found in known if found is None]
    for unit, found in known:
        todo += next_units(unit, found) if found else []
    until = began + parsed.budget
    prepare = lambda: make_data(settings.recipe, settings.work)  # noqa: E731
    run_units(todo, settings, parsed.processes, until, GRACE_SECONDS, note, before=prepare)
    speeds = [Unit("speed", row.name) for row in rows if row.kind == "default"]
    speeds = [unit for unit in speeds if results.done(unit) is None]
    run_units(speeds, settings, 1, time.monotonic() + parsed.speed_seconds, GRACE_SECONDS, note)
    logger.info("%s and %s, %.0f s", results.page, results.lines, time.monotonic() - began)


if __name__ == "__main__":
    main()
