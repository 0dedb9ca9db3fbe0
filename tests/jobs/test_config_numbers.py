"""A config's numbers are refused from the config alone, in a moment, before loops and modules are built from them."""

import json
import time

import pytest

from radlads.model.mixers.shared.options import MixerOptions
from radlads.model.mixers.shared.registry import find_variant
from radlads.model.teacher.load import load_teacher_config
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.jobs.plan.plan import make_plan
from radlads.tasks.jobs.plan.subject import pretrain_config
from radlads.tasks.jobs.sources import demo_folder

MISTAKES = [
    ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
    ("num_hidden_layers", "4", "num_hidden_layers is '4'"),
    ("num_hidden_layers", True, "num_hidden_layers is True"),
    ("num_hidden_layers", None, "num_hidden_layers is None"),
    ("hidden_size", -64, "hidden_size is -64"),
    ("hidden_size", 64.0, "hidden_size is 64.0"),
    ("vocab_size", 2**40, "vocab_size is 1099511627776"),
    ("num_attention_heads", 0, "num_attention_heads is 0"),
    ("layer_types", 7, "layer_types is 7"),
    ("layer_types", [[]], "layer_types is"),
]


@pytest.mark.parametrize(("key", "value", "told"), MISTAKES)
def test_a_teacher_is_refused_by_its_numbers(tmp_path, key, value, told):
    raw = json.loads((demo_folder() / "teacher" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    began = time.monotonic()
    with pytest.raises(UserError, match=told) as caught:
        load_teacher_config(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("key", "value", "told"), MISTAKES[:5])
def test_so_is_one_that_is_to_be_made(key, value, told):
    with pytest.raises(UserError, match=told):
        pretrain_config({"model_type": "qwen3", key: value}, 100)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[1]", "its config.json is not there or holds no settings"),
        (b"{", "no teacher at"),
        (b"\xff\xfe", "no teacher at"),
        (b'{"a": 1}', "no model_type"),
        (b"[" * 50_000, "no teacher at"),
        (b'{"model_type": ["qwen3"]}', "no teacher family"),
    ],
)
def test_a_config_that_is_none(tmp_path, text, told):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=told) as caught:
        load_teacher_config(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("pad_token_id", 10**9, "cannot build the model"), ("rms_norm_eps", "x", "refuses it: .*rms_norm_eps.*float"),
     ("num_hidden_layers", 10**9, "num_hidden_layers")],
)  # fmt: skip
def test_the_plan_says_so_in_one_line(key, value, told):
    asked = load_recipe("demo-teacher", {f"pretrain.config.{key}": value, "data.train.sources": [
        {"kind": "files", "paths": ["demo:stories.txt.gz"]}
    ]})  # fmt: skip
    with pytest.raises(UserError, match=told):
        make_plan(asked, JobResources(device="cpu", processes=1, threads=1))


def test_a_rank_that_nobody_can_build():
    options: type[MixerOptions] = find_variant("rad_rwkv7").Options
    with pytest.raises(UserError, match=r"decay_rank is 1000000000000; at most 65,536"):
        options.parse({"decay_rank": 10**12}, variant="rad_rwkv7")
