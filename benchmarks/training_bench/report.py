"""Rows and profiles of benchmarks/training.py as Markdown."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS, find_kind
from training_bench.case import Case
from training_bench.shapes import CaseFlops

_CHECKPOINT_INTERVAL = 500  # the default of `checkpoint_every`
COLUMNS = (
    "case", "GPUs", "context", "micro × passes", "options", "build", "tokens/s/GPU", "share by rule",
    "mfu", "peak GiB", "mixer keeps, B/token (× width)", "start-up s", "first step s", "stall s (share)",
    "loss 1 → last",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Result of one build of a case. measured: of every rank. failed: why there are no measurements."""

    case: Case
    build: str
    flops: CaseFlops
    measured: list[dict[str, Any]]
    failed: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU (or process)."""
        case = self.case
        return case.batch * case.context / max(rank["seconds"] for rank in self.measured) / case.gpus


def gpu_name() -> str | None:
    """Query without a context on the GPU, all of whose memory the measured programs need."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if not shutil.which(query[0]):
        return None
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def describe_machine(command: str) -> str:
    """Date, hardware and versions."""
    versions = []
    for package in ("torch", "triton", "transformers", "deepspeed", "fla-core", "liger-kernel"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    code = code_version()
    commit = f"; commit {code.sha[:10]}{' with changes' * code.dirty}" if code.sha else ""
    where = gpu_name() or f"CPU, {torch.get_num_threads()} threads"
    return (
        f"## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n\n{where}; {', '.join(versions)}, "
        f"Python {platform.python_version()}{commit}\n\n`{command}`\n"
    )


def legend() -> str:
    """Description of the columns."""
    return (
        "Shares are of the GPU's dense bf16 peak. By rule: FLOP a token are 8 N for distill (student 6 N, teacher 2 N) "
        "and 6 N for finetune, N all the teacher's parameters; align has no rule, both its shares are mfu. mfu: 2 for "
        "every number of a matrix in the forward pass, 2 for the gradient of its input (none for the teacher-forced "
        "input of align's mixers), 2 for its own where it trains, and softmax attention's products of tokens with "
        "tokens; the recurrence and recomputation count nowhere. Start-up: launch of the job to its first "
        f"step. Stall: training stands still for a checkpoint; its share is at one in {_CHECKPOINT_INTERVAL} "
        "steps. Peak: allocated, the largest of all ranks, over the measured steps.\n"
    )


def table(rows: Sequence[Row]) -> str:
    """One line a row."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n" + _ratios(rows)


def _cells(row: Row) -> list[str]:
    case = row.case
    passes = case.batch * case.sequence_parallel // case.micro_batch // case.gpus
    about = [case.name, str(case.gpus), str(case.context), f"{case.micro_batch} × {passes}", _options(case), row.build]
    if row.failed:
        return [*about, f"**{row.failed.splitlines()[0]}**", *[""] * (len(COLUMNS) - len(about) - 1)]
    first = row.measured[0]
    kind = find_kind(gpu_name() or "") if case.device == "cuda" else None
    speed = row.tokens_per_second
    shares = ["", ""]
    if kind is not None:
        peak = GPU_KINDS[kind].peak_flops
        shares = [f"{speed * flops / peak:.1%}" for flops in (row.flops.by_rule, row.flops.counted)]
    mixer = first.get("mixer")
    keeps = f"{mixer['bytes_per_token']:,.0f} ({mixer['bytes_per_token'] / mixer['width_bytes']:.1f})" if mixer else ""
    marks = first["marks"]
    memory = max(rank.get("peak_bytes", 0) for rank in row.measured)
    stall = ""
    if "save_seconds" in first:
        share = first["save_seconds"] / (first["save_seconds"] + _CHECKPOINT_INTERVAL * first["seconds"])
        stall = f"{first['save_seconds']:.3f} ({share:.2%})"
    return [
        *about,
        f"{speed:,.0f}",
        *shares,
        f"{memory / 2**30:.1f}" if memory else "",
        keeps,
        f"{marks['first step begins']:.1f}",
        f"{marks['first step ended'] - marks['first step begins']:.1f}",
        stall,
        f"{first['losses'][0]:.5g} → {first['losses'][-1]:.5g}",
    ]


def _options(case: Case) -> str:
    words = [f"ZeRO-{case.zero}"] + [f"rows on {case.sequence_parallel}"] * (case.sequence_parallel > 1)
    words += [f"engine {case.engine}"] * (case.engine != "product")
    if case.gradient_checkpointing:
        words.append("selective" if case.gradient_checkpointing == "selective" else "checkpointed")
    words += [f"CUDA graphs {case.cuda_graphs}"] * (case.cuda_graphs != "off") + ["offload"] * case.offload
    words += [f"MLP {case.mlp_bits} bit"] * (case.mlp_bits != 16)
    words += [f"teacher {case.teacher_bits} bit"] * (case.teacher_bits != 16)
    words += [f"frozen: {' '.join(case.freeze)}"] * bool(case.freeze)
    words += ["unfused"] * (not case.fused) + [f"log decay {case.decay_dtype}"] * (case.decay_dtype != "auto")
    words += [f"kept: {' '.join(map(str, case.attention_layers))}"] * bool(case.attention_layers)
    return ", ".join(words)


def _ratios(rows: Sequence[Row]) -> str:
    """The product compared with the plain build, where both ran."""
    lines = []
    plain = [row for row in rows if row.build != "product" and not row.failed]
    for row in rows:
        other = next((one for one in plain if one.case == row.case), None)
        if row.build == "product" and not row.failed and other is not None:
            speed = row.tokens_per_second / other.tokens_per_second
            ours, theirs = (max(r.get("peak_bytes", 0) for r in one.measured) for one in (row, other))
            memory = f", {ours / theirs:.0%} of the memory" if theirs else ""
            lines.append(f"- {row.case.name}: {speed:.2f} × the tokens/s of the plain build{memory}")
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def details(row: Row) -> str:
    """Start-up by parts, memory kept by a mixer, and the profile, if any."""
    if row.failed:
        return f"### {row.case.name}, {row.build}\n\n```\n{row.failed}\n```\n"
    first = row.measured[0]
    marks = ", ".join(f"{what} {seconds:.1f}" for what, seconds in first["marks"].items())
    lines = [
        f"### {row.case.name}, {row.build}{', unfused' * (not row.case.fused)}",
        "",
        f"Seconds since the launch: {marks}.",
        "",
    ]
    if "reserved_bytes" in first:
        reserved = max(rank["reserved_bytes"] for rank in row.measured) / 2**30
        retries = sum(rank["retries"] for rank in row.measured)
        lines += [f"Reserved at most {reserved:.1f} GiB; {retries} times torch gave memory back to ask again.", ""]
    if first.get("notes"):
        lines += [f"Build: {first['notes']}.", ""]
    if first.get("mixer"):
        saved = sorted(first["mixer"]["saved"].items(), key=lambda item: -item[1])
        lines += ["Saved by one mixer, bytes a token: " + "; ".join(f"{k}: {v:,.0f}" for k, v in saved) + ".", ""]
    if first.get("memory"):
        lines += _memory(first["memory"])
    if first.get("profile"):
        lines += _profile(first["profile"])
    return "\n".join(lines) + "\n"


def _memory(found: dict[str, Any]) -> list[str]:
    peak, held = found["peak_bytes"] / 2**30, found["held_bytes"] / 2**30
    lines = [
        f"At a step's peak {peak:.2f} GiB are allocated, {held:.2f} of them since before the step; the others:",
        "",
    ]
    lines += ["| GiB | allocations | asked for by |", "| --: | --: | :-- |"]
    return [*lines, *(f"| {size / 2**30:.2f} | {count} | `{place}` |" for size, count, place in found["places"]), ""]


def _profile(profile: dict[str, Any]) -> list[str]:
    total = profile["busy_ms"] or 1.0
    syncs = ", ".join(f"{name} {count:.0f}" for name, count in profile["syncs"].items()) or "none"
    idle = f"GPU idle {profile['idle']:.1%} of {profile['span_ms']:.1f} ms; " if "idle" in profile else ""
    lines = [f"One step under the profiler: {idle}{profile['launches']:.0f} launches; host waits: {syncs}.", ""]
    lines += ["| group | ms | share |", "| :-- | --: | --: |"]
    lines += [f"| {group} | {ms:.2f} | {ms / total:.1%} |" for group, ms in profile["groups"].items()]
    lines += ["", "| part of the step | ms | by group |", "| :-- | --: | :-- |"]
    for part, groups in sorted(profile["parts"].items(), key=lambda item: -sum(item[1].values())):
        inside = ", ".join(f"{group} {ms:.2f}" for group, ms in groups.items())
        lines.append(f"| {part} | {sum(groups.values()):.2f} | {inside} |")
    lines += ["", "| kernel | ms | calls |", "| :-- | --: | --: |"]
    lines += [
        f"| `{name[:110].replace('|', '/')}` | {ms:.2f} | {calls:.1f} |" for name, ms, calls in profile["kernels"]
    ]
    return [*lines, ""]
