"""The plan's checks of a teacher's weights, from the headers of their files alone."""

from __future__ import annotations

from transformers import PreTrainedConfig

from radlads.model.teacher.weights import open_teacher_weights


def check_teacher_weights(path: str, config: PreTrainedConfig, revision: str | None) -> list[str]:
    """Warnings, one line each. Raises UserError for weights that are truncated, missing, misshapen or quantised."""
    weights = open_teacher_weights(path, config, revision=revision, download=False)
    dtype = str(weights.dtype).removeprefix("torch.")
    return [
        f"{count} of the teacher's tensors are kept as {kept} and are rounded to {dtype}, as its config.json says; "
        "set its dtype to keep them as they are"
        for kept, count in weights.rounded().items()
    ]
