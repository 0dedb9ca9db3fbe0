"""What Weights & Biases shows of a stage besides its curves: parameters, final numbers, the pointer to its product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from radlads.tasks.contracts.job import Manifest, TrackingRef
from radlads.tasks.contracts.mirrors.weights_biases import open_wandb, wandb_is_optional
from radlads.tasks.mirrored.inputs import weights_hash
from radlads.tasks.mirrored.products import numbers_of

_shown: dict[str, dict[str, float]] = {}
"""Id of a pipeline's run → its numbers so far."""


def show_product(
    parent: TrackingRef,
    stage: TrackingRef,
    label: str,
    uri: str,
    manifest: Manifest,
    run_config: Mapping[str, Any],
    stage_config: Mapping[str, Any],
) -> bool:
    """Put a product's numbers, and its place and hash, into the summaries of its stage's run and of the run above. An
    outage is no error: W&B keeps what it cannot send. Returns True."""
    numbers = numbers_of(label, manifest, _shown.setdefault(parent.run_id, {}))
    _shown[parent.run_id] |= numbers
    pointer = {"product/uri": uri, "product/digest": manifest.digest, "product/sha256": weights_hash(manifest)}
    own = {key.removeprefix(f"{label}/"): value for key, value in numbers.items() if key.startswith(f"{label}/")}
    for ref, config, summary in (
        (stage, stage_config, own | pointer),
        (parent, run_config, _shown[parent.run_id] | {f"{label}/{key}": value for key, value in pointer.items()}),
    ):
        with wandb_is_optional(ref), open_wandb(ref, config) as run:
            run.summary.update(summary)
    return True
