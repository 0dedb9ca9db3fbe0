"""Garbage: what no run points at is listed, what somebody may still want is never deleted. Over every kind of store."""

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.locks import lease
from radlads.tasks.contracts.locks.lease import product_lease, run_lease
from radlads.tasks.contracts.store.layout import lease_key, product_key
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.contracts.store.pointers import point
from radlads.tasks.upkeep.gc import Wish, collect, find_garbage
from radlads.tasks.upkeep.listing import stored_products, stored_runs

from .test_lease import elsewhere
from .test_store import sheet


@pytest.fixture
def made(store, tmp_path, monkeypatch):
    """Products a, b, c, d. Run `one` points at a, and at b before; run `two` at a and c; nobody at d."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1000)
    folder = tmp_path / "product"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.bin").write_bytes(b"x" * 100)
    for digest in "abcd":
        store.commit(product_key("align", digest), folder, sheet(digest))
        store.put_bytes(f"{product_key('align', digest)}/job/log.txt", b"log")
    for run, digests in {"one": "ba", "two": "a"}.items():
        with run_lease(store, run, tmp_path) as held:
            for digest in digests:
                point(store, run, "align", "align", digest, held)
    with run_lease(store, "two", tmp_path) as held:
        point(store, "two", "distill", "align", "c", held)
    return store


def digests(found):
    return [one.product.digest for one in found]


def test_what_nobody_points_at_is_listed_and_only_that(made):
    (found,) = find_garbage(made, Wish())
    assert found.product.digest == "d"
    assert found.product.committed
    assert found.product.size > 100
    assert 0 <= found.age_seconds < 60
    assert len(stored_products(made)) == 4, "nothing is deleted by looking"
    assert find_garbage(made, Wish(older_than_days=1)) == []


def test_runs_that_are_not_kept_and_history(made):
    assert digests(find_garbage(made, Wish(runs=["one"]))) == ["c", "d"]
    assert find_garbage(made, Wish(runs=["one"]))[0].runs == ("two",)
    assert digests(find_garbage(made, Wish(runs=["two"]))) == ["b", "d"]
    assert digests(find_garbage(made, Wish(history=False))) == ["b", "d"]
    with pytest.raises(UserError, match="there is no run 'tow'"):
        find_garbage(made, Wish(runs=["tow"]))


def test_deleting_takes_all_of_it_but_the_lease(made, tmp_path):
    (gone,) = collect(made, Wish(), tmp_path)
    assert (gone.product.digest, gone.kept) == ("d", "")
    assert made.list(product_key("align", "d")) == [lease_key(product_key("align", "d"))]
    assert [one.digest for one in stored_products(made)] == ["a", "b", "c"]
    assert find_garbage(made, Wish()) == []
    with product_lease(made, "align", "d", tmp_path) as again:
        assert again.ref.token == 2, "a writer that was away is not taken for the next one"


def test_no_empty_folders_stay_beside_the_lease(tmp_path):
    place = LocalStore(StoreRef(uri=str(tmp_path / "store")))
    key = product_key("align", "d")
    for name in ("model/a/weights.bin", "job/log.txt", "lease.json"):
        place.put_bytes(f"{key}/{name}", b"x")
    place.delete(key, keep=[lease_key(key)])
    assert place.age(f"{key}/job/log.txt") is None
    assert [path.name for path in (tmp_path / "store" / key).iterdir()] == ["lease.json"]


def test_the_manifest_goes_first(made, tmp_path, monkeypatch):
    """Readers start from it: one that a collector died over is not there, and is collected by the next one."""
    real, calls = type(made)._delete_keys, []

    def die(self, keys):
        calls.append(list(keys))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(self, keys)

    with monkeypatch.context() as patch:
        patch.setattr(type(made), "_delete_keys", die)
        with pytest.raises(KeyboardInterrupt):
            list(collect(made, Wish(), tmp_path))
    assert calls[0] == [f"{product_key('align', 'd')}/manifest.json"]
    assert made.read_manifest(product_key("align", "d")) is None
    assert digests(collect(made, Wish(), tmp_path)) == ["d"]


def test_what_is_being_made_is_never_touched(made, tmp_path):
    elsewhere(made, lease_key(product_key("align", "d")), run="three")
    assert find_garbage(made, Wish()) == []
    made.delete(lease_key(product_key("align", "d")))
    with product_lease(made, "align", "d", tmp_path):
        assert find_garbage(made, Wish()) == []
    assert digests(find_garbage(made, Wish())) == ["d"]


def test_a_run_at_work_keeps_its_products_whatever_is_wished(made, tmp_path):
    with run_lease(made, "two", tmp_path):
        assert digests(find_garbage(made, Wish(runs=["one"]))) == ["d"]


def test_a_run_that_starts_meanwhile_keeps_what_it_wants(made, tmp_path, monkeypatch):
    """It moves its pointer between the listing and the deletion: after the collector took the lease on the product."""
    real, started = lease.Lease.__enter__, []

    def enter(self):
        entered = real(self)
        if not started and self._mine.deleting:
            started.append(1)
            with run_lease(made, "late", tmp_path) as held:
                point(made, "late", "align", "align", "d", held)
        return entered

    monkeypatch.setattr(lease.Lease, "__enter__", enter)
    (left,) = collect(made, Wish(), tmp_path)
    assert left.kept == "a run points at it now"
    assert made.read_manifest(product_key("align", "d")) is not None


def test_a_product_that_is_wanted_again_meanwhile_is_left_alone(made, tmp_path, monkeypatch):
    from radlads.tasks.upkeep import gc

    real = gc.find_garbage

    def find(store, wish):
        found = real(store, wish)
        elsewhere(store, lease_key(product_key("align", "d")), run="late")
        return found

    monkeypatch.setattr(gc, "find_garbage", find)
    (left,) = collect(made, Wish(), tmp_path)
    assert left.kept == "it is being made again"
    assert made.read_manifest(product_key("align", "d")) is not None


def test_an_unfinished_product_is_garbage_once_nobody_makes_it(made):
    made.put_bytes(f"{product_key('distill', 'e')}/checkpoints/step-000005/state", b"1" * 50)
    assert [(one.product.stage, one.product.committed) for one in find_garbage(made, Wish())] == [
        ("align", True), ("distill", False)
    ]  # fmt: skip


def test_runs_and_what_they_point_at(made):
    runs = {run.name: run for run in stored_runs(made)}
    assert sorted(runs["one"].keys(history=True)) == [product_key("align", "a"), product_key("align", "b")]
    assert list(runs["one"].keys(history=False)) == [product_key("align", "a")]
    assert sorted(runs["two"].keys(history=False)) == [product_key("align", "a"), product_key("align", "c")]
