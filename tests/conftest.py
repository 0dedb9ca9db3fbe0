"""What every test may use."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tensors of tests are small, and two processes of tests share the cores. What tests launch
# gets its threads from its own settings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# What a process of `pytest -n` takes as a whole: these folders, whose tests share servers, and any other file.
FOLDERS_WITH_SERVERS = ("flows", "tasks")
# What takes longest begins first, so that both processes end together; the order of the rest does not matter.
LONG = (
    *FOLDERS_WITH_SERVERS,
    "kernels/test_linear_kl_triton.py",
    "kernels/test_wkv7_triton.py",
    "jobs/test_recipes_run.py",
    "jobs/test_train_launched.py",
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


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """warm_python(*modules, **environment): a Python that has imported them and forks for each program it is given.

    For programs whose start is not what a test is about; see tests/warm_python.py for what it answers.
    """
    path = ROOT / "tests" / "warm_python.py"
    spec = importlib.util.spec_from_file_location("warm_python", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    running: dict[Any, Any] = {}

    def warm(*modules: str, **environment: str) -> Any:
        key = (modules, *environment.items())
        if key not in running:
            running[key] = module.WarmPython(tmp_path_factory.mktemp("programs"), modules, **environment)
        return running[key]

    yield warm
    for one in running.values():
        one.close()


def unit_of(nodeid: str) -> str:
    """The folder or file that a test belongs to, under tests/."""
    file = nodeid.split("::")[0].removeprefix("tests/")
    folder = file.split("/")[0]
    return folder if folder in FOLDERS_WITH_SERVERS else file


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
        items.sort(key=lambda item: [*LONG, unit_of(item.nodeid)].index(unit_of(item.nodeid)))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
