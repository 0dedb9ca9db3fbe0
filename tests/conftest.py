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
# pytest imports readline, which notes the terminal's size in the environment: the processes of `pytest -n` get it, and
# then no test could set another width.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

ROOT = Path(__file__).resolve().parent.parent
# What a process of `pytest -n` takes as a whole: these folders, whose tests share servers, and any other file.
FOLDERS_WITH_SERVERS = ("flows", "tasks")
# What takes longest begins first, so that all processes end together; the order of the rest does not matter.
LONG = (
    *FOLDERS_WITH_SERVERS,
    "kernels/test_linear_kl_triton.py",
    "kernels/test_wkv7_triton.py",
    "jobs/test_recipes_run.py",
    "jobs/test_train_launched.py",
    "jobs/test_training_benchmark.py",
    "model/test_export_releases.py",
    "jobs/test_hosts.py",
    "jobs/test_slurm.py",
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16}
# What a family needs besides, and what shows where it differs: no factor is one, no window wider than the text.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "gemma3_text": {**_KINDS, "query_pre_attn_scalar": 40},
    "olmo3": {**_KINDS, "rope_parameters": {"full_attention": _YARN, "sliding_attention": {"rope_type": "default"}}},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 4.0,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    # Its heads are always as wide as the model's width over their number.
    "cohere2": {**_KINDS, "hidden_size": 64, "logit_scale": 0.25},
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    "exaone4": _KINDS,
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "full_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
}


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


@pytest.fixture(scope="session")
def family_config() -> Callable[..., Any]:
    """family_config(model type, ...) → the config of a tiny teacher."""
    from transformers import AutoConfig

    def make(model_type: str, **changes: Any) -> Any:
        settings = {"tie_word_embeddings": False, **SIZES, **OF_FAMILY.get(model_type, {}), **changes}
        return AutoConfig.for_model(model_type, **settings)

    return make


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
