"""Calibration at the start of align: on the stage's own text, with its effect on held-out text.

An attempt that resumes repeats it with the same result; the checkpoint then replaces the parameters, and the numbers
are in the product's manifest in any case.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.training.calibration import alignment_loss, calibrate
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.teacher import Calibration
from radlads.tasks.contracts.specs import TrainSpec
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.data.loader import TokenDataset, TokenSplit
from radlads.tasks.jobs.train.engines.build import NO_CALIBRATION
from radlads.tasks.jobs.train.training_models import Networks

logger = logging.getLogger("radlads")

_HELDOUT_BATCHES = 2


def calibrate_student(job: Job, spec: TrainSpec, networks: Networks, dataset: TokenDataset) -> dict[str, float]:
    """Calibrate the mixers if the recipe sets it, else return {}. Every rank does the same.

    Returns the step-0 alignment loss (that of 2505.03005, whatever the stage minimises) on held-out text without
    calibration and with it, and the seconds it took.
    """
    if spec.calibrate is None:
        return {}
    if job.spec.resources.zero_stage == 3:
        raise UserError(f"student.calibrate: {NO_CALIBRATION}")
    began, section, context = time.monotonic(), spec.calibrate, spec.section.context
    student, teacher = networks.student, networks.teacher
    assert isinstance(student, RadladsForCausalLM), "align trains a converted student"
    assert teacher is not None, "align has a teacher"
    batches = training_batches(dataset.split("train"), section, context)
    unseen = heldout_batches(dataset.split("heldout"), section.sequences, context) or batches
    before = alignment_loss(student, teacher, unseen)
    calibrate(student, teacher, batches, parts=section.parts)
    after = alignment_loss(student, teacher, unseen)
    numbers = {
        "step0_loss_uncalibrated": before,
        "step0_loss_calibrated": after,
        "calibration_tokens": float(sum(ids.numel() for ids in batches)),
        "calibration_seconds": time.monotonic() - began,
    }
    logger.info("calibration: alignment loss %.4f → %.4f", before, after)
    job.record.log(0, numbers)
    return numbers


def training_batches(split: TokenSplit, section: Calibration, context: int) -> list[torch.Tensor]:
    """Input ids [sequences, context] of rows spread evenly over the training split."""
    count = min(split.rows(context), section.batches * section.sequences)
    rows = np.linspace(0, split.rows(context) - 1, count).astype(np.int64)
    parts = [rows[start : start + section.sequences] for start in range(0, count, section.sequences)]
    return [split.batch(part, context)["input_ids"][:, :-1] for part in parts]


def heldout_batches(split: TokenSplit, sequences: int, context: int) -> list[torch.Tensor]:
    """Input ids of the first rows of the held-out split."""
    context = min(context, split.tokens - 1)
    found = split.heldout(context, sequences, _HELDOUT_BATCHES * sequences * context) if context > 0 else ()
    return [batch["input_ids"][:, :-1] for batch in found]
