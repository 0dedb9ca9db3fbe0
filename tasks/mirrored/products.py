"""Products in MLflow: their numbers in the run above all stages, where runs are compared; links to what is reused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from radlads.tasks.contracts.job import Manifest, TrackingRef
from radlads.tasks.contracts.metrics_record import connect, latest_metrics
from radlads.tasks.contracts.stages import EVALUATE, NEEDLE
from radlads.tasks.contracts.tracking import flatten, metric_name, outage_is_no_error

_SUMMED = ("seconds", "gpu_hours", "dollars")
_PEAK = "memory_bytes"
_JUDGED = {
    EVALUATE.name: ("kl", "student/bits_per_byte", "bits_per_byte_ratio", "relative_score"),
    NEEDLE.name: ("student/needle", "needle_ratio", "student/ruler", "ruler_ratio"),
}
"""Stage → the numbers that a conversion is judged by."""


def mirror_product(
    parent: TrackingRef | None, stage: TrackingRef | None, label: str, uri: str, manifest: Manifest
) -> bool:
    """Show a product in MLflow: its numbers in the pipeline's run as `<stage>/<name>`, with `final/<name>` for what a
    conversion is judged by and `total/<name>` for what all its stages took; the uri of its files in its own. Weights
    are not uploaded. Repeating it changes nothing; an outage is no error. Returns whether MLflow has it."""
    if parent is None:
        return False
    with outage_is_no_error(parent.uri):
        from mlflow.entities import Metric

        client = connect(parent.uri)
        at = int(manifest.created_at.timestamp() * 1000)
        known = latest_metrics(client, parent.run_id)
        numbers = numbers_of(label, manifest, {name: value for name, (_, value) in known.items()})
        metrics = [
            Metric(key, value, at, known[key][0] + 1 if key in known else 0)  # a product made again has other values
            for key, value in numbers.items()
            if key not in known or known[key][1] != value
        ]
        for start in range(0, len(metrics), 1000):
            client.log_batch(parent.run_id, metrics=metrics[start : start + 1000])
        if stage is None:
            return False
        client.set_tag(stage.run_id, "radlads.output_uri", uri)
        files = [entry.model_dump(mode="json", exclude_none=True) for entry in manifest.files]
        client.log_dict(stage.run_id, {"uri": uri, "digest": manifest.digest, "files": files}, "product.json")
        return True
    return False


def link_product(parent: TrackingRef, label: str, uri: str, manifest: Manifest) -> bool:
    """Show in a pipeline's run a product of another run: its uri, its run, and a link to the MLflow run with its
    numbers, which are not copied. Repeating it changes nothing; an outage is no error. Returns whether MLflow has it.
    """
    with outage_is_no_error(parent.uri):
        client, name = connect(parent.uri), f"radlads.reused.{metric_name(label).replace(' ', '-')}"
        tags = {name: uri, f"{name}.digest": manifest.digest, f"{name}.run": manifest.run}
        if manifest.mlflow_run_id is not None:
            tags[f"{name}.mlflow_run_id"] = manifest.mlflow_run_id
        known = client.get_run(parent.run_id).data.tags
        for key, value in tags.items():
            if known.get(key) != value:
                client.set_tag(parent.run_id, key, value)
        return True
    return False


def numbers_of(label: str, manifest: Manifest, known: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a product for the run above its stage: `<label>/<name>`, `final/<name>`, `total/<name>`. known:
    those that the run has already."""
    numbers = {
        f"{metric_name(label)}/{metric_name(key)}": float(value)
        for key, value in flatten(manifest.metrics).items()
        if _is_number(value)
    }
    return numbers | _final(manifest) | _totals({**known, **numbers})


def _final(manifest: Manifest) -> dict[str, float]:
    numbers = flatten(manifest.metrics)
    wanted = {key: numbers.get(key) for key in _JUDGED.get(manifest.stage, ())}
    named = {f"final/{key.removeprefix('student/')}": value for key, value in wanted.items()}
    return {key: float(value) for key, value in named.items() if value is not None and _is_number(value)}


def _totals(numbers: Mapping[str, float]) -> dict[str, float]:
    """Of all stages that this run made: time, cost, the largest memory of a device."""
    stages = {key: value for key, value in numbers.items() if not key.startswith(("total/", "final/"))}
    totals = {}
    for name in _SUMMED:
        values = [value for key, value in stages.items() if key.count("/") == 1 and key.endswith(f"/{name}")]
        if values:
            totals[f"total/{name}"] = sum(values)
    peaks = [value for key, value in stages.items() if key.count("/") == 1 and key.endswith(f"/{_PEAK}")]
    return totals | ({f"total/{_PEAK}": max(peaks)} if peaks else {})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
