"""transplant: a student with its teacher's weights, and a report of what became of every tensor."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel

from radlads.model.export import export_student
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.student import build_student
from radlads.model.teacher import load_teacher
from radlads.model.transplant import TransplantReport, transplant
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.sources import load_tokenizer, resolve_teacher_path
from radlads.tasks.section_choice import listed_layers
from radlads.tasks.specs import TransplantSpec

logger = logging.getLogger("radlads")

# Of the mixers' fresh parameters; the published runs used this seed throughout.
_SEED = 1337
_MAX_SHARD_BYTES = 4_000_000_000
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def main(job: Job) -> dict[str, Any]:
    """Write model/ (the student's Hugging Face folder) and transplant.json. Runs on the CPU, in the teacher's dtype."""
    spec: TransplantSpec = job.typed
    started = time.monotonic()
    reference, student_spec = spec.teacher, spec.student
    teacher = load_teacher(
        resolve_teacher_path(reference.path),
        dtype=None,
        device="cpu",
        revision=reference.revision,
        trust_remote_code=reference.trust_remote_code,
    )
    tokenizer = load_tokenizer(
        reference.path, revision=reference.revision, trust_remote_code=reference.trust_remote_code
    )
    torch.manual_seed(_SEED)
    student = build_student(
        teacher.config,
        variant=student_spec.variant,
        options=student_spec.options,
        attention_layers=listed_layers(student_spec),
        attention_rope=student_spec.attention_rope,
        dtype=teacher.dtype,
    )
    report = transplant(teacher, student)
    sheet = describe(report, teacher, student) | {"seed": _SEED, "teacher": reference.model_dump(mode="json")}
    if not student.mixers():
        sheet["logits"] = compare_logits(teacher, student, required=student_spec.attention_rope)
        logger.info("no layer is converted; %s", sheet["logits"]["verdict"])
    export_student(student, tokenizer, job.output / "model", max_shard_bytes=_MAX_SHARD_BYTES)
    (job.output / "transplant.json").write_text(json.dumps(sheet, indent=1), encoding="utf-8")
    totals = sheet["parameters"]
    logger.info("%d parameters copied, %d fresh, %d dropped", *(totals[k] for k in ("copied", "fresh", "dropped")))
    return {f"{kind}_parameters": count for kind, count in totals.items()} | {
        "converted_layers": len(student.mixers()),
        "seconds": time.monotonic() - started,
    }


def describe(report: TransplantReport, teacher: PreTrainedModel, student: RadladsForCausalLM) -> dict[str, Any]:
    """Parameters copied, fresh and dropped, in all and for every layer, and every tensor's name."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    kinds = {"copied": (report.copied, ours), "fresh": (report.fresh, ours), "dropped": (report.dropped, theirs)}
    layers: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(kinds, 0))
    totals = dict.fromkeys(kinds, 0)
    for kind, (names, tensors) in kinds.items():
        for name in names:
            found = _LAYER.search(f".{name}")
            place = f"layer {int(found[1])}" if found else "outside the layers"
            layers[place][kind] += tensors[name].numel()
            totals[kind] += tensors[name].numel()
    return {
        "parameters": totals,
        "layers": dict(layers),
        "mixers": sorted(student.mixers()),
        "tensors": {kind: list(names) for kind, (names, _) in kinds.items()} | {"tied": list(report.tied)},
    }


@torch.no_grad()
def compare_logits(teacher: PreTrainedModel, student: RadladsForCausalLM, *, required: bool) -> dict[str, Any]:
    """Whether an unconverted student computes its teacher's logits bit for bit.

    required: the kept attention layers have their rotary positions; without them the student is another network.
    Raises RuntimeError when the logits must be equal and are not.
    """
    generator = torch.Generator().manual_seed(_SEED)
    input_ids = torch.randint(teacher.config.vocab_size, (2, 48), generator=generator)
    ours, theirs = student.eval()(input_ids).logits, teacher(input_ids).logits
    equal = torch.equal(ours, theirs)
    difference = (ours.float() - theirs.float()).abs().max().item()
    if required and not equal:
        raise RuntimeError(f"no layer is converted, yet the logits differ from the teacher's by up to {difference:.3g}")
    verdict = "its logits equal the teacher's bit for bit" if equal else "its logits differ: attention_rope is off"
    return {"bit_equal": equal, "largest_difference": difference, "verdict": verdict}


if __name__ == "__main__":
    run_job(main)
