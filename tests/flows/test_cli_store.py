"""`radlads store`: what a person sees of runs and products, and what is deleted."""

import pytest
from typer.testing import CliRunner

from radlads.flows.cli import app
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.locks.lease import product_lease, run_lease
from radlads.tasks.contracts.store.layout import product_key
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.contracts.store.pointers import point

from ..tasks.test_store import sheet
from ..tasks.test_upgrade import OldStore, expected


@pytest.fixture
def radlads(tmp_path, monkeypatch):
    """The command, over a store of the test's own; its output. What it raises is raised."""
    monkeypatch.setenv("RADLADS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        done = CliRunner().invoke(app, ["store", *arguments, "--store", str(tmp_path / "store")])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    return run


@pytest.fixture
def store(tmp_path):
    """Run one points at product a, run two at a and c; b belongs to nobody; publish of two is not finished."""
    place = LocalStore(StoreRef(uri=str(tmp_path / "store")))
    (tmp_path / "product").mkdir()
    (tmp_path / "product" / "weights.bin").write_bytes(b"x" * 2048)
    for digest in "abc":
        place.commit(product_key("align", digest * 64), tmp_path / "product", sheet(digest * 64))
    for run, wanted in {"one": {"align": "a"}, "two": {"align": "a", "distill": "c", "publish": "d"}}.items():
        with run_lease(place, run, tmp_path) as held:
            for label, digest in wanted.items():
                point(place, run, label, "publish" if label == "publish" else "align", digest * 64, held)
    return place


def test_list_and_where(radlads, store):
    told = radlads("list")
    assert f"one align {'a' * 12}" in told
    assert f"two publish {'d' * 12} gone" in told
    assert "2 runs, 3 products" in told
    assert "1 products are shared by runs" in told
    assert radlads("where", "two", "distill") == store.join(product_key("align", "c" * 64))
    with pytest.raises(UserError, match="has no 'distill'; it has align"):
        radlads("where", "one", "distill")
    with pytest.raises(UserError, match="is not finished"):
        radlads("where", "two")


def test_gc_lists_and_deletes_only_when_it_is_told_to(radlads, store):
    told = radlads("gc")
    assert f"align/{'b' * 12}" in told
    assert "1 products" in told
    assert "--delete deletes them" in told
    assert store.read_manifest(product_key("align", "b" * 64)) is not None
    assert "deleted 1 products" in radlads("gc", "--delete")
    assert store.read_manifest(product_key("align", "b" * 64)) is None
    told = radlads("gc", "--keep-runs", "one")
    assert f"align/{'c' * 12}" in told
    assert "two" in told
    assert "0 products" in radlads("gc", "--keep-runs", "one", "--older-than", "1")
    with pytest.raises(UserError, match="there is no run 'three'"):
        radlads("gc", "--keep-runs", "one,three", "--delete")
    assert store.read_manifest(product_key("align", "c" * 64)) is not None


def test_upgrade(radlads, tmp_path):
    old = OldStore(LocalStore(StoreRef(uri=str(tmp_path / "store")))).fill()
    for command in (["list"], ["gc"], ["where", "r", "align"]):
        with pytest.raises(UserError, match="radlads store upgrade"):
            radlads(*command)
    told = radlads("upgrade", "--tracking", "none")
    assert "7 products converted, 7 old places removed, 0 left as they were" in told
    assert radlads("where", "r", "align").endswith(expected(old)["align"])
    assert "0 products converted, 0 old places removed" in radlads("upgrade", "--tracking", "none")


@pytest.mark.parametrize(
    "command",
    [
        ("store", "list"),
        ("store", "where", "first"),
        ("store", "gc", "--delete"),
        ("store", "upgrade"),
        ("evaluate", "first"),
        ("sync", "first"),
        ("evaluate", "first", "--recipe", "smoke"),
        ("sweep", "--table", "rates"),
    ],
)
def test_looking_into_a_store_that_is_not_there_makes_none(command, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("RADLADS_HOME", str(home))
    done = CliRunner().invoke(app, list(command))
    assert isinstance(done.exception, UserError)
    assert "there is no store at" in str(done.exception)
    assert not home.exists()


def test_looking_into_an_empty_store_leaves_it_empty(radlads, tmp_path):
    (tmp_path / "store").mkdir()
    for command in (("list",), ("gc", "--delete")):
        assert "0 products" in radlads(*command)
    assert list((tmp_path / "store").iterdir()) == []


def test_what_is_being_made_is_not_called_gone(radlads, store, tmp_path):
    assert "publish dddddddddddd gone" in radlads("list")
    with product_lease(store, "publish", "d" * 64, tmp_path, run="two"):
        assert "publish dddddddddddd just begun" in radlads("list")
