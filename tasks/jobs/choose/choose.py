"""The choose job: selects the layers of an aligned student that become softmax attention again, and restores them.

By difficulty: from the loss curves of the align stage. By recall: from forward passes of the student with candidate
layers restored, over quiz documents and held-out text, split over the ranks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from radlads.model.convert.layer_choice import difficulty_scores, spaced_layers
from radlads.model.convert.restore import restore_attention
from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import find_family, load_teacher
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import Difficulty
from radlads.tasks.contracts.specs import ChooseSpec
from radlads.tasks.jobs.choose.choice_chart import draw_choice
from radlads.tasks.jobs.choose.recall_choice import choose_by_recall
from radlads.tasks.jobs.common import Job, run_job, write_json
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.judge.divided import hold, is_divided, loading_device
from radlads.tasks.jobs.judge.judged_models import STUDENT, open_tokenizer
from radlads.tasks.jobs.origin import check_data, check_judged
from radlads.tasks.jobs.plan.choice_plan import difficulty_weights
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
        choice_result = choose_by_recall(job, student, teacher, tokenizer, choice, spec.run_tokens)
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


if __name__ == "__main__":
    run_job(main)
