"""Datasets and models in MLflow: what a stage read, what it made. Pointers and hashes; nothing is uploaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from radlads.tasks.contracts.job import InputRef, Manifest, TrackingRef, canonical_json
from radlads.tasks.contracts.metrics_record import connect
from radlads.tasks.contracts.stages import MODEL_STAGES, PUBLISH, TOKENIZE
from radlads.tasks.contracts.tracking import outage_is_no_error

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

_LONGEST_DIGEST = 36
"""Of a dataset's digest in MLflow's database."""
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def show_inputs(ref: TrackingRef, inputs: Mapping[str, InputRef], spec: Mapping[str, Any]) -> bool:
    """Show what a stage reads: datasets (products, and the texts and teachers that its plan pinned) and models that
    earlier stages made. Repeating it changes nothing; an outage is no error. Returns whether MLflow has it."""
    with outage_is_no_error(ref.uri):
        from mlflow.entities import LoggedModelInput

        client = connect(ref.uri)
        shown = client.get_run(ref.run_id).inputs
        known = {(one.dataset.name, one.dataset.digest) for one in (shown.dataset_inputs if shown else ())}
        datasets = [*_pinned(spec), *_products(inputs)]
        fresh = [one for one in datasets if (one.dataset.name, one.dataset.digest) not in known]
        read = {one.model_id for one in (shown.model_inputs if shown else ())}
        experiment = client.get_run(ref.run_id).info.experiment_id
        digests = [given.digest for given in inputs.values() if _stage_of(given) in MODEL_STAGES]
        models = [found for digest in digests if (found := _find_model(client, experiment, digest)) is not None]
        new = [LoggedModelInput(model) for model in dict.fromkeys(models) if model not in read]
        if fresh or new:
            client.log_inputs(ref.run_id, datasets=fresh, models=new)
        return True
    return False


def show_model(ref: TrackingRef, run: str, uri: str, manifest: Manifest) -> bool:
    """Show the model that a stage made, as an output of its run, under `RUN-STAGE`; what was published as a version of
    the registered model that has the recipe's name, too. Both have the place of the weights in the store and their hash
    as tags. Repeating it changes nothing; an outage is no error. Returns whether MLflow has it."""
    if manifest.stage not in (*MODEL_STAGES, PUBLISH.name):
        return True
    with outage_is_no_error(ref.uri):
        from mlflow.entities import LoggedModelOutput

        client = connect(ref.uri)
        tags = {
            "radlads.uri": uri,
            "radlads.digest": manifest.digest,
            "radlads.sha256": weights_hash(manifest),
            "radlads.run": run,
            "radlads.stage": manifest.stage,
        }
        experiment = client.get_run(ref.run_id).info.experiment_id
        model = _find_model(client, experiment, manifest.digest)
        if model is None:
            name = f"{run}-{manifest.stage}".replace(".", "-")
            made = client.create_logged_model(
                experiment, name, source_run_id=ref.run_id, tags=tags, model_type="student"
            )
            model = made.model_id
            client.finalize_logged_model(model, "READY")
            client.log_outputs(ref.run_id, [LoggedModelOutput(model, 0)])
        if manifest.stage == PUBLISH.name:
            _register(client, ref, tags)
        return True
    return False


def weights_hash(manifest: Manifest) -> str:
    """sha256 over the names and hashes of a product's weight files."""
    files = {one.path: one.sha256 for one in manifest.files if one.path.endswith(_WEIGHTS)}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def _register(client: MlflowClient, ref: TrackingRef, tags: Mapping[str, str]) -> None:
    from mlflow.exceptions import MlflowException

    name = ref.experiment
    try:
        client.create_registered_model(name, description="Students made from the recipe of this name.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get("radlads.digest") == tags["radlads.digest"]:
            return
    # A server takes no folder of another machine as a source: the pointer lies beside the run.
    source = f"runs:/{ref.run_id}/product.json"
    about = f"{tags['radlads.run']}: {tags['radlads.uri']}"
    client.create_model_version(name, source, run_id=ref.run_id, tags=dict(tags), description=about)


def _find_model(client: MlflowClient, experiment: str, digest: str) -> str | None:
    found = client.search_logged_models(
        [experiment], filter_string=f"tags.`radlads.digest` = '{digest}'", max_results=1
    )
    return str(found[0].model_id) if found else None


def _stage_of(given: InputRef) -> str:
    """The stage that made a product: its address ends in products/<stage>/<digest>."""
    return given.uri.rstrip("/").rpartition("/")[0].rpartition("/")[2]


def _products(inputs: Mapping[str, InputRef]) -> Iterator[DatasetInput]:
    for name, given in inputs.items():
        if _stage_of(given) == TOKENIZE.name:
            yield _dataset(name, given.digest, {"uri": given.uri, "digest": given.digest}, "tokens")


def _pinned(spec: Mapping[str, Any]) -> Iterator[DatasetInput]:
    """The texts, hub datasets and tasks that a spec names, by the content that the plan found."""
    for location, pin in spec.get("pins", {}).items():
        if pin["kind"] not in ("teacher", "tokenizer"):
            source = {"place": pin["place"], "revision": pin["revision"], "content": pin["content"]}
            yield _dataset(f"{pin['kind']}: {', '.join(pin['place'])}"[:450], pin["content"], source, location)
    teacher = spec.get("teacher")
    if teacher is not None:
        source = {"path": teacher["path"], "fingerprint": teacher["fingerprint"]}
        yield _dataset(f"teacher: {teacher['path']}"[:450], teacher["fingerprint"], source, "teacher")


def _dataset(name: str, content: str, source: Mapping[str, Any], context: str) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = content if len(content) <= _LONGEST_DIGEST else hashlib.sha256(content.encode()).hexdigest()[:32]
    dataset = Dataset(name, digest, source_type="radlads", source=json.dumps(source))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
