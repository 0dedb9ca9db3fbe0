"""What a person sees of the flows in Prefect's pages: descriptions, recipes to choose from, titles, the run's log."""

import logging

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.utilities.schema_tools.validation import validate

from radlads.flows.convert import radlads
from radlads.flows.evaluate import radlads_evaluate
from radlads.flows.form import _title
from radlads.flows.pretrain import radlads_pretrain
from radlads.flows.sweep import radlads_sweep
from radlads.tasks.contracts.recipe.recipe import list_recipes
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.observe import ProgressView

FLOWS = [radlads, radlads_evaluate, radlads_pretrain, radlads_sweep]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_every_parameter_says_what_it_is(flow):
    for name, field in flow.parameters.properties.items():
        assert field.get("description"), name
    assert flow.description
    assert "Args:" not in flow.description or flow.description.index("Args:") > 0


@pytest.mark.parametrize("flow", [radlads, radlads_pretrain], ids=lambda flow: flow.name)
def test_a_recipe_has_to_be_chosen(flow):
    assert flow.parameters.required == ["recipe"]
    shipped, own = flow.parameters.properties["recipe"]["anyOf"]
    assert set(shipped["enum"]) <= set(list_recipes())
    assert "enum" not in own
    schema = flow.parameters.model_dump_for_openapi()
    nothing = dict.fromkeys(name for name in flow.parameters.properties if name != "recipe")
    for recipe in (shipped["enum"][0], "/data/mine.yaml"):
        assert validate({"recipe": recipe, **nothing}, schema) == []
    assert validate({"recipe": "smoke", "store": "s3://a:b@host"}, schema)


def test_the_recipes_are_all_there():
    offered = [
        one["enum"] for flow in (radlads, radlads_pretrain) for one in flow.parameters.properties["recipe"]["anyOf"][:1]
    ]
    assert sorted(name for names in offered for name in names) == list_recipes()
    assert offered[0][0] == "qwen3-8b-hybrid"


@pytest.mark.parametrize(
    ("given", "title"),
    [
        ({"recipe": "qwen3-8b-hybrid", "run": "mine"}, "mine: Qwen3-8B to rad_rwkv7 (hybrid)"),
        ({"recipe": "smollm2-135m-pure", "run": "b"}, "b: SmolLM2-135M-Instruct.Q4_1.gguf to rad_rwkv7 (pure)"),
        ({"recipe": "smoke", "overrides": {"student.variant": "hxa079"}}, "smoke-12345678: demo to hxa079 (hybrid)"),
        ({"recipe": "demo-teacher", "run": "t"}, "t: a teacher by demo-teacher"),
        ({"recipe": "/nowhere/mine.yaml", "run": "t"}, "t: mine"),
        ({"recipe": "no-such"}, "no-such"),
    ],
)
def test_a_title_says_teacher_variant_and_run(given, title):
    assert _title(given, "1234567890") == title


@pytest.mark.usefixtures("prefect_server")
def test_a_run_has_its_title_and_its_log(recipe, places, jobs):
    state = radlads(recipe, run="mine", **places, return_state=True)
    assert state.is_completed()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
        assert run.name == "mine: demo to rad_rwkv7 (hybrid)"
        logging.getLogger("prefect.radlads").handlers[0].flush()
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        said = [log.message for log in client.read_logs(wanted, limit=200)]
    assert "in all: 0 reused, 0 continued, 8 new" in said
    assert any(line.startswith("distill: 1 of 2 steps") for line in said)


def test_the_log_has_a_line_a_minute_and_one_at_the_end(caplog):
    now = [0.0]
    view = ProgressView("run", "distill", clock=lambda: now[0])
    with caplog.at_level(logging.INFO, "prefect.radlads"):
        for second in range(0, 301, 5):
            now[0] = float(second)
            view.show(Progress(second, 300, "steps", {"loss": 1.5, "tokens_per_second": 9000.4}))
    lines = [record.getMessage() for record in caplog.records if record.name == "prefect.radlads"]
    assert lines == [
        "distill: 0 of 300 steps · loss 1.5 · 9,000 tokens/s",
        *(f"distill: {n} of 300 steps · loss 1.5 · 9,000 tokens/s · {left} to go"
          for n, left in [(60, "4 min"), (120, "3 min"), (180, "2 min"), (240, "60 s")]),
        "distill: 300 of 300 steps · loss 1.5 · 9,000 tokens/s",
    ]  # fmt: skip
