"""transplant: a student with its teacher's weights, and a report on every tensor."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel

from radlads.model.convert.transplant import TransplantReport, stream_transplant
from radlads.model.student.export import export_papers
from radlads.model.student.load import build_student, load_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import load_generation_config, load_teacher, load_teacher_config
from radlads.model.teacher.weights import TeacherWeights, open_teacher_weights
from radlads.tasks.contracts.recipe.choice import listed_layers
from radlads.tasks.contracts.recipe.recipe import Student
from radlads.tasks.contracts.specs import TransplantSpec
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.origin import write_origin
from radlads.tasks.jobs.sources import load_tokenizer
from radlads.tasks.jobs.teacher.place import teacher_place

logger = logging.getLogger("radlads")

# Seed of the mixers' fresh parameters, plus the layer's number; the published runs used this one throughout.
_SEED = 1337
_MAX_SHARD_BYTES = 4_000_000_000
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def main(job: Job) -> dict[str, Any]:
    """Write model/ (the student's Hugging Face folder) and transplant.json, tensor by tensor from the teacher's files:
    no complete model is in memory, except if no layer is converted, to check that the student equals its teacher. Runs
    on the CPU, in the teacher's dtype.
    """
    spec: TransplantSpec = job.typed
    started = time.monotonic()
    reference, student_spec = spec.teacher, spec.student
    place, folder = teacher_place(job, reference), job.output / "model"
    path, revision = place.path, place.revision
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=reference.trust_remote_code)
    config = load_teacher_config(path, revision=revision)
    weights = open_teacher_weights(path, config, revision=revision)
    with torch.device("meta"):
        student = build_student(
            config,
            variant=student_spec.variant,
            options=student_spec.options,
            attention_layers=listed_layers(student_spec),
            attention_rope=student_spec.attention_rope,
            attention_log_scale=student_spec.attention_log_scale,
            untie_embeddings=student_spec.untie_embeddings,
            dtype=weights.dtype,
        )
    student.generation_config = load_generation_config(path, config, revision=revision)
    scale = student_spec.transplant.model_dump()
    report = stream_transplant(
        weights,
        student,
        folder,
        dtype=weights.dtype,
        seed=_SEED,
        scale=scale,
        max_shard_bytes=_MAX_SHARD_BYTES,
        on_progress=lambda done, total: job.progress(done, total, "tensors"),
    )
    write_origin(student.config, reference)
    export_papers(student, tokenizer, folder)
    sheet = describe(report, weights, student)
    sheet |= {"seed": _SEED, "multipliers": scale, "teacher": reference.model_dump(mode="json")}
    if not student.mixers():
        teacher = load_teacher(path, revision=revision)
        sheet["logits"] = compare_logits(teacher, load_student(folder), required=_as_the_teachers(student_spec))
        logger.info("no layer is converted; %s", sheet["logits"]["verdict"])
    (job.output / "transplant.json").write_text(json.dumps(sheet, indent=1), encoding="utf-8")
    totals = sheet["parameters"]
    logger.info("%d parameters copied, %d fresh, %d dropped", *(totals[k] for k in ("copied", "fresh", "dropped")))
    return {f"{kind}_parameters": count for kind, count in totals.items()} | {
        "converted_layers": len(student.mixers()),
        "seconds": time.monotonic() - started,
    }


def describe(report: TransplantReport, weights: TeacherWeights, student: RadladsForCausalLM) -> dict[str, Any]:
    """Parameters copied, fresh and dropped, in total and per layer, and every tensor's name."""
    ours = {name: tensor.numel() for name, tensor in student.state_dict().items()}
    theirs = {name: math.prod(shape) for name, shape in weights.shapes.items()} | weights.left_out
    kinds = {"copied": (report.copied, ours), "fresh": (report.fresh, ours), "dropped": (report.dropped, theirs)}
    layers: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(kinds, 0))
    totals = dict.fromkeys(kinds, 0)
    for kind, (names, sizes) in kinds.items():
        for name in names:
            found = None if name in weights.left_out else _LAYER.search(f".{name}")
            place = f"layer {int(found[1])}" if found else "outside the layers"
            layers[place][kind] += sizes[name]
            totals[kind] += sizes[name]
    return {
        "parameters": totals,
        "layers": dict(layers),
        "mixers": sorted(student.mixers()),
        "tensors": {kind: list(names) for kind, (names, _) in kinds.items()} | {"tied": list(report.tied)},
    }


def _as_the_teachers(student: Student) -> bool:
    """Whether softmax attention that is kept computes what the teacher's does."""
    return student.attention_rope and student.attention_log_scale is None


@torch.no_grad()
def compare_logits(teacher: PreTrainedModel, student: RadladsForCausalLM, *, required: bool) -> dict[str, Any]:
    """Check whether an unconverted student computes its teacher's logits bit for bit.

    required: the kept attention layers are the teacher's; without rotary positions, or with scaled scores, the student
    is another network.
    Raises RuntimeError when the logits must be equal and are not.
    """
    generator = torch.Generator().manual_seed(_SEED)
    input_ids = torch.randint(teacher.config.vocab_size, (2, 48), generator=generator)
    ours, theirs = student.eval()(input_ids).logits, teacher(input_ids).logits
    equal = torch.equal(ours, theirs)
    difference = (ours.float() - theirs.float()).abs().max().item()
    if required and not equal:
        raise RuntimeError(f"no layer is converted, yet the logits differ from the teacher's by up to {difference:.3g}")
    why = "attention_rope is off" if not student.config.attention_rope else "attention_log_scale is on"
    verdict = "its logits equal the teacher's bit for bit" if equal else f"its logits differ: {why}"
    return {"bit_equal": equal, "largest_difference": difference, "verdict": verdict}


if __name__ == "__main__":
    run_job(main)
