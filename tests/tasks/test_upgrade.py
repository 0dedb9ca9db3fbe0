"""A store of the layout before, written as the version before wrote it, becomes one of this layout and goes on."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import canonical_json
from radlads.tasks.contracts.locks import lease
from radlads.tasks.contracts.locks.lease import LeaseHeld, run_lease
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.specs import PlanSpec, parse_spec, spec_digest
from radlads.tasks.contracts.store.layout import check_layout, former_keys, product_key
from radlads.tasks.contracts.store.pointers import read_pointers
from radlads.tasks.pipeline import finished_students
from radlads.tasks.upkeep import upgrade as module
from radlads.tasks.upkeep.gc import Wish, collect
from radlads.tasks.upkeep.upgrade import upgrade_store

PIN = {"kind": "files", "place": ["/a.txt"], "revision": None, "content": "c" * 64, "commits": {}, "files": []}
TEACHER = {"path": "demo", "revision": None, "trust_remote_code": False, "fingerprint": "f" * 64,
           "tokenizer_fingerprint": "t" * 64}  # fmt: skip
RECIPE = {
    "name": "tiny", "teacher": {"path": "demo"}, "student": {"attention_layers": [1]},
    "data": {"train": {"sources": [{"kind": "files", "paths": ["/a.txt"]}]}},
    "align": {"data": "train", "tokens": 4096, "context": 64, "batch": 4},
    "distill": {"data": "train", "tokens": 4096, "context": 64, "batch": 4},
}  # fmt: skip
CODE = {"sha": "c958173", "dirty": False, "versions": {}}
RUN_ID = "1" * 32


class OldStore:
    """Writes what commit c958173 wrote, as it wrote it: no code of then is needed."""

    def __init__(self, store):
        self.store = store
        self.recipe = json.loads(parse_recipe(RECIPE).model_dump_json())
        for stage in ("align", "distill"):
            del self.recipe[stage]["decay_dtype"]  # a key that there was not

    def spec(self, stage, **changes):
        train = {"pins": {}, "teacher": TEACHER, "trust_remote_code": False, "teacher_bits": 16, "mlp_bits": 16}
        specs = {
            "plan": {"recipe": self.recipe, "preview": False, "sizes_only": False},
            "tokenize": {
                "name": "train", "dataset": self.recipe["data"]["train"], "tokenizer": "demo", "teacher": None,
                "pins": {"dataset.sources.0.paths": PIN}, "tokenizer_fingerprint": "t" * 64, "trust_remote_code": False,
            },
            "transplant": {"teacher": TEACHER, "student": self.recipe["student"]},
            "align": {**train, "objective": "align", "section": self.recipe["align"], "calibrate": None},
            "distill": {**train, "objective": "distill", "section": self.recipe["distill"], "calibrate": None},
            "publish": {"section": self.recipe["publish"], "recipe": self.recipe},
        }  # fmt: skip
        return specs[stage] | changes

    def begin(self, prefix, stage, spec, inputs, run, **more):
        """job/ of a stage, as the flow and the job left it; returns the digest of then."""
        refs = {name: {"uri": self.store.join(key), "digest": digest} for name, (key, digest) in inputs.items()}
        sheet = {"schema_version": 2, "stage": stage, "spec": spec, "inputs": {n: d for n, (_, d) in inputs.items()}}
        digest = hashlib.sha256(canonical_json(sheet).encode()).hexdigest()
        job = {
            "schema_version": 2, "stage": stage, "run": run, "recipe": "tiny", "digest": digest, "spec": spec,
            "inputs": refs, "output_uri": self.store.join(prefix), "store": self.store.ref.model_dump(mode="json"),
            "tracking": {"uri": "sqlite:////x.db", "experiment": "tiny", "run_id": RUN_ID},
            "lease": {"key": f"runs/{run}/lease.json", "token": 1},
            "resources": {"device": "cpu", "processes": 1, "zero_stage": 1, "threads": 2, "offload_optimizer": False,
                          "gpu_memory_gib": None, "dollars_per_gpu_hour": None},
            "scratch": f"/work/{run}/{stage}", "content_cache": None,
        }  # fmt: skip
        self.store.put_bytes(f"{prefix}/job/job.json", json.dumps(job, indent=1).encode())
        self.store.put_bytes(f"{prefix}/job/log.txt", b"=== attempt\n")
        self.store.put_bytes(f"{prefix}/job/metrics.jsonl", b'{"step": 1, "time": 1, "loss": 1.0}\n')
        return digest, refs

    def manifest(self, prefix, stage, digest, refs, spec, files):
        entries = []
        for name, (data, stored_as) in files.items():
            self.store.put_bytes(f"{prefix}/{stored_as or name}", data)
            sha = hashlib.sha256(data).hexdigest()
            entries.append({"path": name, "size": len(data), "sha256": sha, "stored_as": stored_as})
        made = {
            "schema_version": 2, "stage": stage, "digest": digest, "inputs": refs, "spec": spec, "files": entries,
            "metrics": {"loss": 0.5}, "mlflow_run_id": RUN_ID, "code": CODE, "kernels": {},
            "created_at": datetime(2026, 11, 1, tzinfo=UTC).isoformat(),
        }  # fmt: skip
        self.store.put_bytes(f"{prefix}/manifest.json", json.dumps(made, indent=1).encode())

    def commit(self, prefix, stage, inputs=None, run="r", files=None, **changes):
        """A committed product; (key, digest of then), as an input of later ones."""
        spec = self.spec(stage, **changes)
        digest, refs = self.begin(prefix, stage, spec, inputs or {}, run)
        self.manifest(prefix, stage, digest, refs, spec, files or {f"{stage}.json": (stage.encode(), None)})
        return prefix, digest

    def fill(self):
        """Run r: finished up to align, distill killed after a checkpoint. Run s: the same dataset, another align."""
        put = self.store.put_bytes
        put("runs/r/recipe.yaml", b"name: tiny\n")
        put("runs/r/recipe-0123456789ab.yaml", b"name: tiny\n")
        self.commit("runs/r/plan", "plan", files={"plan.json": (b"{}", None)})
        data = self.commit("datasets/abc", "tokenize", files={"index.json": (b"{}", None), "bin/0": (b"tokens", None)})
        students = {}
        for run in ("r", "s"):
            students[run] = self.commit(
                f"runs/{run}/transplant", "transplant", run=run,
                files={"model/config.json": (b"{}", None), "model/model.safetensors": (b"w" * 999, ".objects/abc")},
            )  # fmt: skip
        align = self.commit("runs/r/align", "align", {"data": data, "student": students["r"]})
        section = {**self.recipe["align"], "tokens": 8192}
        self.commit("runs/s/align", "align", {"data": data, "student": students["s"]}, run="s", section=section)
        inputs = {"data": data, "student": align}
        digest, _ = self.begin("runs/r/distill", "distill", self.spec("distill"), inputs, "r")
        place = "runs/r/distill/checkpoints/step-000004"
        own = {"checkpoint_of": digest, "step": 4}
        of_checkpoint = hashlib.sha256(f"{digest}/step-000004".encode()).hexdigest()
        self.manifest(place, "distill", of_checkpoint, {}, own, {"checkpoint.json": (b"{}", None)})
        put("runs/r/distill/checkpoints/latest", b"step-000004\n")
        put("runs/r/distill/checkpoints/step-000008/state.safetensors", b"half")
        return self


@pytest.fixture
def old(store, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1000)
    return OldStore(store).fill()


def expected(old):
    """Digests of today: specs as today's models read them, and inputs by their digests of today."""

    def digest(stage, inputs=(), **changes):
        given = old.spec(stage, **changes)
        if stage in ("align", "distill"):
            given["section"] = given["section"] | {"decay_dtype": "float32"}  # as they trained
        spec = parse_spec(stage, given)
        return spec_digest(stage, spec, {name: ref(digest) for name, digest in inputs})

    def ref(digest):
        from radlads.tasks.contracts.job import InputRef

        return InputRef(uri="anywhere", digest=digest)

    data, student = digest("tokenize"), digest("transplant")
    align = digest("align", [("data", data), ("student", student)])
    return {
        "plan": spec_digest("plan", PlanSpec(recipe=parse_recipe(RECIPE), run="r"), {}),
        "tokenize-train": data, "transplant": student, "align": align,
        "distill": digest("distill", [("data", data), ("student", align)]),
    }  # fmt: skip


def test_a_store_is_converted_and_everything_is_found_where_it_is_asked_for(old, tmp_path):
    store, wanted = old.store, expected(old)
    with pytest.raises(UserError, match="radlads store upgrade"):
        check_layout(store)
    said = []
    done = upgrade_store(store, tmp_path, tell=said.append)
    assert done.left == {}
    assert {label: pointer.digest for label, pointer in read_pointers(store, "r").items()} == wanted
    other = {label: pointer.digest for label, pointer in read_pointers(store, "s").items()}
    assert set(other) == {"transplant", "tokenize-train", "align"}
    assert other["transplant"] == wanted["transplant"], "two runs had made the same"
    assert other["align"] != wanted["align"]
    align = store.read_manifest(product_key("align", wanted["align"]))
    assert (align.schema_version, align.run, align.metrics, align.mlflow_run_id) == (3, "r", {"loss": 0.5}, RUN_ID)
    assert align.inputs["student"].uri == f"{store.uri}/products/transplant/{wanted['transplant']}"
    got = store.fetch(product_key("transplant", wanted["transplant"]), tmp_path / "got")
    assert (got / "model" / "model.safetensors").read_bytes() == b"w" * 999
    assert list(finished_students(store, "r")) == ["transplant", "align"]
    assert former_keys(store) == []
    assert store.list("datasets") == []
    assert store.get_bytes("runs/r/recipe.yaml") == b"name: tiny\n"
    assert store.get_bytes("runs/r/recipe-0123456789ab.yaml") is not None
    check_layout(store)
    assert any(line.startswith("runs/r/align → products/align/") for line in said)
    assert upgrade_store(store, tmp_path).moved == [], "again: nothing"


def test_an_unfinished_stage_goes_on_from_its_checkpoint(old, tmp_path):
    store, digest = old.store, expected(old)["distill"]
    upgrade_store(store, tmp_path)
    key = product_key("distill", digest)
    assert store.read_manifest(key) is None
    checkpoint = store.read_manifest(f"{key}/checkpoints/step-000004")
    assert checkpoint.spec == {"checkpoint_of": digest, "step": 4}
    assert checkpoint.schema_version == 3
    assert store.read_file(f"{key}/checkpoints/step-000004", "checkpoint.json") == b"{}"
    assert store.get_bytes(f"{key}/checkpoints/latest") == b"step-000004\n"
    assert store.list(f"{key}/checkpoints/step-000008") == [], "what was not committed is nothing to go on from"
    assert b'"step": 1' in store.get_bytes(f"{key}/job/metrics.jsonl")
    job = json.loads(store.get_bytes(f"{key}/job/job.json"))
    assert (job["digest"], job["schema_version"], job["lease"]) == (digest, 3, None)


def test_what_a_killed_flow_left_in_its_scratch_folder_says_what_was_to_be_made(old, tmp_path):
    """kill -9 of a flow: checkpoints are in the store, the job's own sheet is not."""
    store, digest = old.store, expected(old)["distill"]
    job = store.get_bytes("runs/r/distill/job/job.json")
    store.delete("runs/r/distill/job")
    done = upgrade_store(store, tmp_path / "elsewhere")
    assert set(done.left) == {"runs/r/distill"}
    assert "convert the store there, with --work" in done.left["runs/r/distill"]
    scratch = tmp_path / "work" / "r" / "distill"
    scratch.mkdir(parents=True)
    (scratch / "job.json").write_bytes(job.replace(store.uri.encode(), b"/another/store"))
    assert set(upgrade_store(store, tmp_path / "work").left) == {"runs/r/distill"}
    (scratch / "job.json").write_bytes(job)
    assert upgrade_store(store, tmp_path / "work").left == {}
    assert store.read_manifest(f"{product_key('distill', digest)}/checkpoints/step-000004") is not None
    assert read_pointers(store, "r")["distill"].digest == digest


# Where it stops makes no difference to a store; each kind of store goes through one way of each.
STOPS = ["adopt", "copy", "write_history", "delete", "put_bytes"]
STOPPED = [("local", when, keep) for when in STOPS for keep in (False, True)]
STOPPED += [(kind, *stop) for kind in ("moto", "rclone", "ceph") for stop in (("copy", False), ("adopt", True))]


@pytest.mark.parametrize(("store", "when", "keep"), STOPPED, indirect=["store"])
def test_an_interrupted_conversion_goes_on(old, tmp_path, monkeypatch, when, keep):
    """Stopped at the first, the second, ... call of its kind, again and again, until it gets through."""
    store, wanted = old.store, expected(old)
    owner, real = (module, module.write_history) if when == "write_history" else (type(store), None)
    real = real or getattr(type(store), when)
    for allowed in (0, 2, 5):
        calls = []

        def stop(*arguments, _calls=calls, _allowed=allowed, **named):
            _calls.append(1)
            if len(_calls) > _allowed:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, when, stop)
            try:
                upgrade_store(store, tmp_path, keep_old=keep)
            except KeyboardInterrupt:
                continue
            break
    upgrade_store(store, tmp_path, keep_old=keep)
    assert {label: pointer.digest for label, pointer in read_pointers(store, "r").items()} == wanted
    for label in ("plan", "transplant", "align"):
        key = product_key(label, wanted[label])
        store.verify(key, store.open_manifest(key))
    assert (former_keys(store) == []) != keep
    check_layout(store)


@pytest.mark.parametrize("keep_old", [True, False])
def test_what_was_collected_since_is_converted_again_before_its_old_place_goes(old, tmp_path, keep_old):
    store, wanted = old.store, expected(old)
    upgrade_store(store, tmp_path, keep_old=True)
    gone = {product_key(stage, wanted[stage]) for stage in ("align", "distill")}
    store.delete("runs/r/stages/align.json")
    store.delete("runs/r/stages/distill.json")
    assert {one.product.key for one in collect(store, Wish(), tmp_path)} == gone
    again = upgrade_store(store, tmp_path, keep_old=keep_old)
    assert ({one.key for one in again.moved}, again.left) == (gone, {})
    assert {label: pointer.digest for label, pointer in read_pointers(store, "r").items()} == wanted
    assert store.read_manifest(product_key("align", wanted["align"])) is not None
    assert store.list(f"{product_key('distill', wanted['distill'])}/checkpoints")
    assert bool(former_keys(store)) is keep_old


def test_damaged_files_are_not_converted_and_nothing_is_removed(old, tmp_path):
    store = old.store
    store.put_bytes("runs/r/align/align.json", b"ALIGN, longer")
    before = former_keys(store)
    with pytest.raises(Exception, match=r"align\.json|runs/r/align"):
        upgrade_store(store, tmp_path)
    assert former_keys(store) == before
    with pytest.raises(UserError, match="radlads store upgrade"):
        check_layout(store)


def test_what_todays_models_cannot_read_stays_and_is_said(old, tmp_path):
    store = old.store
    manifest = json.loads(store.get_bytes("runs/r/align/manifest.json"))
    manifest["spec"]["section"]["key_of_long_ago"] = 1
    store.put_bytes("runs/r/align/manifest.json", json.dumps(manifest).encode())
    done = upgrade_store(store, tmp_path)
    assert set(done.left) == {"runs/r/align", "runs/r/distill"}
    assert "key_of_long_ago" in done.left["runs/r/align"]
    assert "its input 'student'" in done.left["runs/r/distill"]
    assert store.read_manifest("runs/r/align") is not None
    assert set(read_pointers(store, "r")) == {"plan", "transplant", "tokenize-train"}
    check_layout(store)


def test_a_store_that_was_moved_finds_its_inputs_by_their_digests(old, tmp_path):
    store = old.store
    for key in store.list("runs"):
        data = store.get_bytes(key)
        if key.endswith(("manifest.json", "job.json")):
            store.put_bytes(key, data.replace(store.uri.encode(), b"/elsewhere"))
    assert upgrade_store(store, tmp_path).left == {}
    assert {label: p.digest for label, p in read_pointers(store, "r").items()} == expected(old)


def test_a_run_at_work_is_waited_for_by_the_person(old, tmp_path):
    with run_lease(old.store, "r", tmp_path), pytest.raises(LeaseHeld):
        upgrade_store(old.store, tmp_path)


def test_a_folder_is_linked_not_copied(tmp_path):
    from radlads.tasks.contracts.job import StoreRef
    from radlads.tasks.contracts.store.open import LocalStore

    old = OldStore(LocalStore(StoreRef(uri=str(tmp_path / "store")))).fill()
    upgrade_store(old.store, tmp_path, keep_old=True)
    (key,) = {pointer.key for pointer in read_pointers(old.store, "s").values() if pointer.stage == "transplant"}
    new, before = (
        Path(old.store.uri, key, "model/config.json"),
        Path(old.store.uri, "runs/s/transplant/model/config.json"),
    )
    assert new.samefile(before) or new.stat().st_dev == before.stat().st_dev
