"""The choose job: selects the layers of an aligned student that become softmax attention again, and restores them.

By difficulty: from the loss curves of the align stage. By recall: from forward passes of the student with candidate
layers restored, over quiz documents and held-out text, split over the ranks.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.model.convert.layer_choice import LayerScore, Round, difficulty_scores, recall_layers, spaced_layers
from radlads.model.convert.layer_scores import BEFORE, Sums, TokenCount, sum_layers, teacher_recall
from radlads.model.convert.restore import restore_attention
from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import find_family, load_teacher
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import Difficulty, RecallProbe
from radlads.tasks.contracts.specs import ChooseSpec
from radlads.tasks.jobs.choose.choice_chart import draw_choice
from radlads.tasks.jobs.choose.choice_probe import make_quizzes, own_share, quiz_batches, text_batches
from radlads.tasks.jobs.common import Job, NonFiniteError, run_job, write_json
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.judge.divided import hold, is_divided, loading_device
from radlads.tasks.jobs.judge.judged_models import STUDENT, open_tokenizer
from radlads.tasks.jobs.origin import check_data, check_judged
from radlads.tasks.jobs.plan.choice_plan import difficulty_weights
from radlads.tasks.jobs.process_group import gather
from radlads.tasks.jobs.sources import load_tokenizer
from radlads.tasks.jobs.teacher.place import teacher_place

logger = logging.getLogger("radlads")

_LAYER = "layer_"


def main(job: Job) -> dict[str, Any] | None:
    """Write model/, choose.json and choose.png; returns the layers, scores before and after, and the cost."""
    spec: ChooseSpec = job.typed
    choice, reference, started = spec.section, spec.teacher, time.monotonic()
    student, teacher = _load(job, loading_device(job))
    if student.config.attention_layers:
        raise UserError("layers can be chosen only after an align of all layers, but this student has attention layers")
    check_judged(job, [STUDENT], reference, open_tokenizer(job, reference), other_teacher=False)
    tokenizer = load_tokenizer(str(_folder(job)), trust_remote_code=reference.trust_remote_code)
    if choice.choose == "recall":
        check_data(open_dataset(job.input("data")).tokenizer_fingerprint, reference.tokenizer_fingerprint)
        attentions = find_family(teacher.config).attention_modules(teacher).values()
        teacher = hold(job, teacher, (part for attention in attentions for part in attention.children()))
        student = hold(job, student)
        choice_result = choose_by_recall(job, student, teacher, tokenizer, choice.count, choice.recall, spec.run_tokens)
    else:
        choice_result = choose_by_difficulty(job, sorted(student.mixers()), choice.count, choice.difficulty)
    if job.rank != 0:
        return None
    if is_divided(student):
        student, teacher = _load(job, loading_device(job))
    layers = choice_result["attention_layers"]
    logger.info("layers %s become softmax attention", ", ".join(map(str, layers)))
    tensors = restore_attention(student, teacher, layers, attention_rope=spec.attention_rope)
    export_student(student.eval(), tokenizer, job.output / "model")
    result = {
        "choose": choice.choose,
        "count": choice.count,
        **choice_result,
        "attention_rope": spec.attention_rope,
        "tensors": tensors,
        "dtype": str(student.dtype).removeprefix("torch."),
        "processes": job.world_size,
        "seconds": time.monotonic() - started,
    }
    write_json(job.output / "choose.json", result)
    draw_choice(result, job.output / "choose.png")
    for row in result["layers"]:
        numbers = {
            key: float(value) for key, value in row.items() if key not in ("layer", "round") and value is not None
        }
        job.record.log(row["layer"], {f"choose/{key}": value for key, value in numbers.items()})
    for name in ("choose.json", "choose.png"):
        job.record.artifact(job.output / name)
    return {
        "attention_layers": list(layers),
        **result["numbers"],
        "seconds": result["seconds"],
        "processes": job.world_size,
    }


def _load(job: Job, device: torch.device) -> tuple[RadladsForCausalLM, PreTrainedModel]:
    """Student and teacher, both in the student's precision: the teacher's attention is copied into the student."""
    spec: ChooseSpec = job.typed
    student = load_student(_folder(job), dtype=None, device=device)
    place = teacher_place(job, spec.teacher)
    return student, load_teacher(place.path, dtype=student.dtype, device=device, revision=place.revision)


def _folder(job: Job) -> Path:
    return job.input("student") / "model"


def choose_by_difficulty(job: Job, layers: Sequence[int], count: int, section: Difficulty) -> dict[str, Any]:
    """Choose among `layers` by the loss curves in the align stage's metrics.jsonl; gaps are counted among them.

    Raises UserError if a layer has none.
    """
    path = job.input("student") / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [row for row in map(json.loads, text.splitlines()) if "loss" in row]
    curves = {
        layer: [float(row[f"{_LAYER}{layer:02d}"]) for row in rows if row.get(f"{_LAYER}{layer:02d}") is not None]
        for layer in layers
    }
    weights = difficulty_weights(section)
    scores = difficulty_scores(curves, weights=weights)
    ranked = {rank: scores[layer] for rank, layer in enumerate(layers)}
    chosen = [layers[rank] for rank in spaced_layers(ranked, count, num_layers=len(layers), weights=weights)]
    table = [
        {"layer": layer, "score": scores[layer], "loss": curves[layer][-1], "chosen": layer in chosen}
        for layer in sorted(scores)
    ]
    return {
        "attention_layers": chosen,
        "layers": table,
        "numbers": {"tokens": 0, "token_share": 0.0, "steps_read": len(rows)},
    }


def choose_by_recall(
    job: Job,
    student: RadladsForCausalLM,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    section: RecallProbe,
    run_tokens: int,
) -> dict[str, Any]:
    """Choose layers by greedy selection. Collective: each rank scores its share, and all get the same result."""
    folder = job.input("data")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    bos_id = tokenizer.bos_token_id if index.get("add_bos") else None
    quizzes = quiz_batches(make_quizzes(section, tokenizer), section.micro_batch, bos_id=bos_id)
    texts = list(text_batches(open_dataset(folder).split("heldout"), section))
    mine = [batch for kind in (quizzes, texts) for batch in own_share(kind, job.rank, job.world_size)]
    used, num_layers = TokenCount(), len(student.mixers())
    total = len(mine) * (1 + sum(num_layers - i for i in range(count)))
    done = 0
    known: dict[frozenset[int], Sums] = {}

    def passed() -> None:
        nonlocal done
        done += 1
        job.progress(done, total, "passes")

    def score(kept: tuple[int, ...], remaining: tuple[int, ...]) -> tuple[LayerScore, dict[int, LayerScore]]:
        scored = [*(() if frozenset(kept) in known else (BEFORE,)), *remaining]
        own = sum_layers(student, teacher, mine, kept=kept, candidates=scored, count=used, progress=passed)
        parts = gather(own, job.world_size)
        for layer in scored:
            key = frozenset(kept) if layer == BEFORE else frozenset({*kept, layer})
            known[key] = sum((part[layer] for part in parts), Sums())
        before = known[frozenset(kept)].score()
        _check_finite(before)
        logger.info("with %s: recall %.3f nats, KL %.4f", list(kept) or "no layer", before.recall, before.kl)
        return before, {layer: known[frozenset({*kept, layer})].score() for layer in remaining}

    chosen, rounds = recall_layers(score, count, sorted(student.mixers()))
    theirs = sum(gather(teacher_recall(teacher, mine, count=used), job.world_size), Sums()).score()
    tokens = sum(gather(used.student + used.teacher, job.world_size))
    if tokens > section.budget * run_tokens:
        raise UserError(
            f"the choice used {tokens} tokens, more than {section.budget:.0%} of the run's {run_tokens}; lower "
            "recall.documents or recall.heldout_tokens"
        )
    after = known[frozenset(chosen)].score()
    return {
        "attention_layers": list(chosen),
        "layers": _table(rounds, chosen),
        "rounds": [_round(number, result) for number, result in enumerate(rounds)],
        "teacher": {"recall": theirs.recall, "accuracy": theirs.accuracy},
        "probe": {
            "documents": section.documents,
            "answers": known[frozenset()].answers,
            "text_tokens": known[frozenset()].text_tokens,
        },
        "numbers": {
            "tokens": tokens,
            "token_share": tokens / run_tokens,
            "recall_teacher": theirs.recall,
            "accuracy_teacher": theirs.accuracy,
            **{f"{key}_before": value for key, value in vars(rounds[0].before).items()},
            **{f"{key}_after": value for key, value in vars(after).items()},
        },
    }


def _table(rounds: list[Round], chosen: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per layer: its scores in the first round, and the round in which it was chosen."""
    first, taken = rounds[0], {result.chosen: number for number, result in enumerate(rounds, start=1)}
    return [
        {
            "layer": layer,
            "score": _finite(first.values[layer]),
            "recall_gained": _finite(score.recall - first.before.recall),
            "accuracy": _finite(score.accuracy),
            "kl_saved": _finite(first.before.kl - score.kl),
            "kl": _finite(score.kl),
            "chosen": layer in chosen,
            "round": taken.get(layer),
        }
        for layer, score in sorted(first.scores.items())
    ]


def _round(number: int, result: Round) -> dict[str, Any]:
    scores = {
        str(layer): {key: _finite(value) for key, value in vars(score).items()}
        | {"score": _finite(result.values[layer])}
        for layer, score in sorted(result.scores.items())
    }
    return {"round": number + 1, "before": vars(result.before), "candidates": scores, "chosen": result.chosen}


def _check_finite(score: LayerScore) -> None:
    if not all(map(math.isfinite, vars(score).values())):
        raise NonFiniteError("the recall or KL of the aligned student is not finite, so its layers cannot be compared")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    run_job(main)
