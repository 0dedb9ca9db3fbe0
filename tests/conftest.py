"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tensors of tests are small, and two processes of tests share the cores. What tests launch
# gets its threads from its own settings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# Files that share servers, which the first of them starts: they stay in one process of `pytest -n 2`.
SHARE_SERVERS = {
    "flows": ("convert", "deployments", "foreground", "retry", "services", "ui_retry", "zombies"),
    "tasks": ("credentials", "disk", "lease", "stage", "store", "store_faults", "store_local", "store_s3"),
}
# What takes longest begins first, so that both processes end together; the order of the rest does not matter.
BEGIN = (
    "flows/",
)


@pytest.fixture(scope="session")
def project_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real small teachers, texts and references that are not part of the project; a test of them skips without."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared folder with real teachers and texts is not beside the project")
    return folder


def place_of(nodeid: str) -> str:
    """`folder/name` of a test's file, without `test_`."""
    path = Path(nodeid.split("::")[0])
    return f"{path.parent.name}/{path.stem.removeprefix('test_')}"


def unit_of(nodeid: str) -> str:
    """What a process of `pytest -n` takes as a whole: a file, or all files that share servers."""
    folder, _, name = place_of(nodeid).partition("/")
    return folder if name in SHARE_SERVERS.get(folder, ()) else f"{folder}/{name}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Units in the order of collection, one after the other to whichever process is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return ByUnit(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: BEGIN.index(unit) if (unit := unit_of(item.nodeid)) in BEGIN else len(BEGIN))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
