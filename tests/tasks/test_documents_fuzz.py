"""Whatever a recipe, an override or a job.json holds: it is read, or refused in lines that a person can use."""

import json
import math
from importlib import resources
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef, TrackingRef, read_job
from radlads.tasks.contracts.parsing.yaml_reader import read_yaml
from radlads.tasks.contracts.recipe.recipe import dump_recipe, list_recipes, load_recipe, parse_recipe
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
from radlads.tasks.contracts.recipe.sections import Recipe
from radlads.tasks.contracts.specs import PlanSpec, TokenizeSpec, parse_spec

TEXTS = {
    name: (resources.files("radlads.deployments") / "recipes" / f"{name}.yaml").read_bytes() for name in list_recipes()
}
NASTY = [
    b"!!bool x", b"2024-13-45", b"&a [*a]", b"*a", b"&a ", b"[" * 99, b"{" * 99, b"- " * 99, b"1e999", b".nan",
    b"-.inf", b"010", b"9" * 30, b"9" * 5000, b"0x", b"0o9", b"1_", b"\x00", b"\xff", b"\xc3\x28", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"'", b'"', b'"\\ud800"', b'"\\0"', b"%TAG ! x", b"@", b"`", b"\t", b"~", b"[]",
    b"{}", b"-1", b"yes", b"1:30", b"? x", b"<<: 1", b"---\n", b"...\n", b"!!python/object/apply:os.system [x]",
    b"!!binary x", b": ", b"\n", b"#", b"|\n", b">\n", b"name: x\n", b"\x1b[31m", b"hf_abcdefghijklmnopqrstuvwxyz",
    b"http://a:b@c", b"/\x01", b"~nobody/x",
]  # fmt: skip
FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def mutated(draw, whole, nasty=tuple(NASTY)):
    """Bytes with one to three places cut out, doubled, or written over."""
    data = draw(st.sampled_from(whole))
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from([0, 1, 2, 5, 40, 400])))
        kind = draw(st.sampled_from(["insert", "value", "double", "noise", "cut"]))
        if kind == "value":  # what follows the next colon
            begin = data.find(b":", begin) + 2
            end = max(begin, data.find(b"\n", begin))
        made = {
            "insert": draw(st.sampled_from(nasty)),
            "value": draw(st.sampled_from(nasty)),
            "double": 2 * data[begin:end],
            "noise": draw(st.binary(max_size=4)),
            "cut": b"",
        }[kind]
        data = data[:begin] + made + data[end:]
    return data


def explains(error, beginning="", most_lines=21):
    lines = str(error).split("\n")
    assert 1 <= len(lines) <= most_lines
    for line in lines:
        assert line.strip()
        assert line.startswith(beginning)
        assert line.isprintable(), line
        assert len(line) < 1000
        assert "Traceback" not in line


def holds(recipe):
    assert isinstance(recipe, Recipe)
    assert parse_recipe(read_yaml(dump_recipe(recipe).encode(), where="again")) == recipe


@settings(FUZZ, max_examples=2200)
@given(mutated(list(TEXTS.values())))
def test_recipes(data):
    try:
        recipe = parse_recipe(read_yaml(data, where="mine.yaml"), where="mine.yaml")
        anchor_recipe(recipe, "mine.yaml", Path("/"))
    except UserError as error:
        explains(error, "mine.yaml")
    else:
        holds(recipe)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from([10**400, -(10**400), "\ud800", "\0", "x" * 300_000, math.nan, math.inf, b"x", {1: 2}])
    | st.just({"a" * 999: 1}),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip
KEYS = st.sampled_from([
    "name", "teacher", "teacher.path", "student", "student.attention_layers", "student.options", "data",
    "data.train", "data.train.sources", "align", "align.tokens", "align.batch", "distill.mixer_rate", "distill.phases",
    "evaluate.seed", "needle.lengths", "resources.processes", "publish.title", "a.b.c", "", ".",
    "align.", "name.x", "align.tokens.x",
])  # fmt: skip


@settings(FUZZ, max_examples=800)
@given(st.sampled_from(["smoke", "demo-teacher", "qwen3-8b-hybrid"]), st.dictionaries(KEYS, VALUES, max_size=3))
def test_overrides(name, overrides):
    try:
        recipe = load_recipe(name, overrides)
    except UserError as error:
        explains(error)
    else:
        holds(recipe)


def job(stage, spec):
    return JobSpec(
        stage=stage, run="r", recipe="smoke", digest="d", spec=spec.model_dump(mode="json"), output_uri="/s/runs/r/x",
        store=StoreRef(uri="/s"), tracking=TrackingRef(uri="http://m", experiment="e", run_id="i"),
        resources=JobResources(device="cpu", processes=1, threads=1), scratch="/work/r/x",
    )  # fmt: skip


SMOKE = load_recipe("smoke")
TOKENIZE = TokenizeSpec(
    name="train",
    dataset=next(iter(SMOKE.data.values())),
    tokenizer="t",
    tokenizer_fingerprint="f",
    teacher=None,
)
JOBS = [job("plan", PlanSpec(recipe=SMOKE)), job("tokenize", TOKENIZE)]
NASTY_JSON = [
    b"NaN", b"-Infinity", b"1e999", b"9" * 30, b"9" * 6000, b"[" * 300, b'{"a":' * 300, b'"\\ud800"', b'"\\u0000"',
    b"null", b"true", b"[]", b"{}", b'""', b"-1", b"1.5", b'"\xff"', b"\x00", b",", b"}", b'"stage":"align",',
    b'"schema_version":2,',
]  # fmt: skip


@settings(FUZZ, max_examples=1000)
@given(mutated([made.model_dump_json(indent=1).encode() for made in JOBS], tuple(NASTY_JSON)))
def test_jobs(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "job.json"
    path.write_bytes(data)
    try:
        spec = read_job(path)
        typed = parse_spec(spec.stage, spec.spec)
    except UserError as error:
        explains(error, most_lines=1)
    else:
        json.dumps(spec.model_dump(mode="json"), allow_nan=False)
        json.dumps(typed.model_dump(mode="json"), allow_nan=False)
