"""`radlads init`: drafts that plan without a fault, on any machine, for any teacher whose sizes are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from radlads.flows.cli.init import _write, parse_gpus, recipe_name
from radlads.model.teacher.load import parse_teacher_config
from radlads.model.teacher.weights import build_empty
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.pins.known_teachers import known_config, known_names
from radlads.tasks.contracts.recipe.recipe import load_recipe, recipe_of_data
from radlads.tasks.contracts.requests.draft import Draft, DraftRequest
from radlads.tasks.jobs.draft.draft import choose, draft
from radlads.tasks.jobs.draft.fit import fit_to_machine
from radlads.tasks.jobs.draft.machine import machine_of
from radlads.tasks.jobs.draft.protocols import efforts, rates
from radlads.tasks.jobs.draft.stages_text import Fit
from radlads.tasks.jobs.draft.subject import find_candidate
from radlads.tasks.jobs.draft.texts import source_text
from radlads.tasks.jobs.draft.write import write_recipe
from radlads.tasks.jobs.plan.plan import make_plan
from radlads.tasks.jobs.plan.sizes import count_networks, describe_device
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data/configs"
# Published sizes, of the models' own cards or reports.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "microsoft/phi-4": 14_659_507_200,
    "RekaAI/reka-flash-3": 20_905_482_240,
    "RekaAI/reka-flash-3.1": 20_905_482_240,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def asked(teacher: str, **changes) -> DraftRequest:
    values = {"hybrid": True, "gpus": 8, "gpu": "H100", "name": "mine", "command": "radlads init", "out": "unused"}
    return DraftRequest(teacher=teacher, **(values | changes))


def planned(made: Draft, resources: JobResources):
    """The plan of the written recipe, as `radlads plan --sizes-only` makes it."""
    recipe = recipe_of_data(made.text.encode(), None, where="draft")
    changes = {"zero_stage": recipe.resources.zero_stage, "offload_optimizer": recipe.resources.offload_optimizer}
    return recipe, make_plan(recipe, resources.model_copy(update=changes), preview=True, sizes_only=True)


@pytest.mark.parametrize("name", known_names())
def test_known_sizes_are_the_published_ones(name: str) -> None:
    config = parse_teacher_config(known_config(name))
    counted = sum(parameter.numel() for parameter in build_empty(config).parameters())
    if name in PUBLISHED:
        assert counted == PUBLISHED[name]
    else:
        number, unit = re.search(r"(\d+(?:\.\d+)?)([BM])", name).groups()
        size = float(number) * (1e6 if unit == "M" else 1e9)
        assert 0.75 * size < counted < 1.25 * size


def test_every_recipes_teacher_is_known() -> None:
    recipes = [load_recipe(path.stem) for path in Path(__file__).parents[2].glob("deployments/recipes/[!t]*.yaml")]
    named = {recipe.teacher.path for recipe in recipes if recipe.teacher is not None and "/" in recipe.teacher.path}
    assert named
    assert named <= set(known_names())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared configs are not here")
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Qwen3-8B.json", "Qwen/Qwen3-8B"),
        ("Qwen3-14B.json", "Qwen/Qwen3-14B"),
        ("Reka-Flash-3.json", "RekaAI/reka-flash-3"),
        ("Reka-Flash-3.1.json", "RekaAI/reka-flash-3.1"),
        ("Phi-4.json", "microsoft/phi-4"),
        ("Qwen2.5-0.5B-Instruct.json", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Mistral-Small-3-24B.json", "mistralai/Mistral-Small-24B-Instruct-2501"),
    ],
)
def test_known_sizes_are_those_of_the_models_own_config(file: str, name: str) -> None:
    theirs, ours = json.loads((SHARED / file).read_text()), known_config(name)
    theirs.setdefault("head_dim", theirs["hidden_size"] // theirs["num_attention_heads"])
    assert {key: theirs.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("name", "gpus", "gpu", "hybrid"),
    [
        ("Qwen/Qwen3-8B", 8, "H100", True),
        ("Qwen/Qwen2.5-7B-Instruct", 1, "H200", False),
        ("RekaAI/reka-flash-3.1", 4, "MI300X", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 1, "RTX 4090", True),
        ("meta-llama/Llama-3.2-3B-Instruct", 6, "A100", True),
    ],
)
def test_a_draft_plans_without_a_fault(name: str, gpus: int, gpu: str, hybrid: bool) -> None:
    made = draft(asked(name, hybrid=hybrid, gpus=gpus, gpu=gpu))
    machine = machine_of(asked(name, gpus=gpus, gpu=gpu))
    recipe, plan = planned(made, machine.resources)
    assert not plan.misfits
    assert made.kind == ("hybrid" if hybrid else "pure")
    assert bool(recipe.student.attention_layers) is hybrid
    offer = next(offer for offer in made.offers if offer.name == made.chosen)
    assert offer.tokens == sum(getattr(recipe, stage).tokens for stage in recipe.training_stages)
    assert plan.gpu_hours == pytest.approx(offer.gpu_hours / machine.slower)
    assert recipe.resources.processes == gpus
    costs = [offer.dollars for offer in made.offers if not offer.fault]
    assert costs == sorted(costs)


def test_what_does_not_fit_is_found_a_way_in_order() -> None:
    name = "Qwen/Qwen3-32B"
    teacher = find_candidate(name)
    effort = efforts(teacher.parameters)[0]

    def settings(gpus: int, gpu: str):
        request = asked(name, gpus=gpus, gpu=gpu, hybrid=False)
        machine = machine_of(request)
        text = write_recipe(request, teacher, machine, effort, Fit())
        recipe = recipe_of_data(text.encode(), None, where="draft")
        networks = counted.setdefault("networks", None) or count_networks(recipe, teacher.config)
        counted["networks"] = networks
        fit = fit_to_machine(recipe, networks, machine.resources, describe_device(machine.resources))
        text = write_recipe(request, teacher, machine, effort, fit)
        return recipe_of_data(text.encode(), None, where="draft")

    counted = {}
    roomy, divided, frozen = settings(8, "MI325X"), settings(8, "H200"), settings(8, "H100")
    assert roomy.resources.zero_stage < 3
    assert divided.resources.zero_stage == 3
    assert not divided.distill.freeze
    assert frozen.distill.freeze == ("mlp",)
    assert frozen.resources.zero_stage == 3
    assert frozen.align.freeze == ()
    with pytest.raises(UserError, match=r"would need [\d.]+ GiB on the GPU, which has 24\.0"):
        settings(1, "RTX 4090")


def test_the_budget_chooses() -> None:
    made = draft(asked("HuggingFaceTB/SmolLM2-135M-Instruct", gpus=1))
    assert made.chosen == "usual"
    costs = {offer.name: offer.dollars for offer in made.offers}
    assert list(costs) == ["trial", "short", "usual"]
    for name, cost in costs.items():
        assert choose(asked("x", budget=cost + 0.01), made.offers) == name
    assert choose(asked("x", budget=1e6), made.offers) == "usual"
    with pytest.raises(UserError, match=r"\$0\.05 is not enough.*trial.*is planned at"):
        choose(asked("x", budget=0.05), made.offers)
    with pytest.raises(UserError, match="choose trial, short, usual"):
        choose(asked("x", effort="huge"), made.offers)
    assert choose(asked("x", effort="short"), made.offers) == "short"
    first, *others = made.offers
    small = (first.model_copy(update={"fault": "align would need 99 GiB"}), *others)
    with pytest.raises(UserError, match="99 GiB"):
        choose(asked("x", effort="trial"), small)
    none = tuple(offer.model_copy(update={"fault": "align would need 99 GiB"}) for offer in made.offers)
    with pytest.raises(UserError, match="99 GiB"):
        choose(asked("x"), none)


def test_a_local_teacher_with_its_own_text(tmp_path: Path, teacher_folder: Path) -> None:
    text = tmp_path / "mine.txt.gz"
    text.write_bytes(b"")
    made = draft(asked(str(teacher_folder), gpus=0, gpu="", data=(str(text), "my/set")))
    recipe, plan = planned(made, machine_of(asked("x", gpus=0, gpu="")).resources)
    assert recipe.teacher.path == str(teacher_folder)
    assert [source.kind for source in recipe.data["text"].sources] == ["files", "hub"]
    assert recipe.resources.device == "cpu"
    assert plan.dollars is None
    assert "without a chat template" in made.facts[1] or "with a chat template" in made.facts[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", "files"), ("a.md", "files"), ("a.ndjson.gz", "files"), ("a: b #1 'c\"d.parquet", "files"), ("a", "hub")],
)
def test_own_text_is_a_source_of_its_kind(tmp_path: Path, name: str, kind: str) -> None:
    place = tmp_path / name
    place.mkdir() if kind == "hub" else place.write_bytes(b"")
    (source,) = yaml.safe_load(f"[{source_text(str(place))}]")
    assert source == {"kind": kind} | ({"path": str(place)} if kind == "hub" else {"paths": [str(place)]})


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("", "'': there is no such file"),
        ("missing.txt", "'missing.txt': there is no such file; give a file, a folder, or a data set of the hub"),
        ("my data", "no such file"),
        ("a/b/c", "no such file"),
        ("/nowhere", "no such file"),
        ("s3://bucket/x.jsonl", "no such file"),
        ("nothing*.txt", r"no file matches 'nothing\*\.txt'"),
        ("demo:nothing.txt", "no file matches"),
    ],
)
def test_text_that_is_not_there_is_refused(place: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        draft(asked("demo", data=(place,)))


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "NOTES.TXT").write_text("x")
    for place in (tmp_path / "NOTES.TXT", tmp_path / "N*"):
        with pytest.raises(UserError, match=r"NOTES\.TXT: unknown kind of file; known endings are \.parquet"):
            source_text(str(place))


def test_a_misfit_names_only_what_was_tried() -> None:
    with pytest.raises(UserError, match=r"GiB on the GPU, which has 1\.0; with one row a pass, an 8-bit") as fault:
        draft(asked("demo:llama", gpus=1, gpu="", gpu_memory_gib=1.0))
    assert "ZeRO" not in str(fault.value)
    with pytest.raises(UserError, match=r"of memory with one row a pass, and this machine has .*--gpus 8xH100"):
        draft(asked("Qwen/Qwen2.5-72B-Instruct", gpus=0, gpu=""))


def test_batches_that_outgrow_their_source_are_said() -> None:
    small, large = (draft(asked("HuggingFaceTB/SmolLM2-135M-Instruct", gpus=gpus)) for gpus in (5, 512))
    assert not any("batches are" in note for note in small.notes)
    assert any("batches are 512 for 64 in align, 512 for 96 in distill:" in note for note in large.notes)


def test_a_toys_sources_are_true(teacher_folder: Path) -> None:
    recipe, _ = planned(draft(asked(str(teacher_folder))), machine_of(asked("x")).resources)
    assert recipe.student.attention_layers.choose == "last"
    assert not any("by recall" in source for source in recipe.sources)


def test_the_command_stays_in_its_comment() -> None:
    made = draft(asked("demo:llama", command="radlads init x --out 'a\nname: other\x1b.yaml'"))
    assert recipe_of_data(made.text.encode(), None, where="x").name == "mine"


def test_wrong_names_are_answered_with_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "llama-mini").mkdir()
    (tmp_path / "llama-mini/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no teacher folder.*near it: \S*llama-mini"):
        draft(asked(str(tmp_path / "lama-mini")))
    with pytest.raises(UserError, match="no shipped teacher 'demo:lama'; shipped are demo:llama, demo:qwen2, demo"):
        draft(asked("demo:lama"))
    with pytest.raises(UserError, match="near it: Qwen/Qwen3-8B"):
        draft(asked("Qwen3-8B"))
    with pytest.raises(UserError, match=r"near it: .*Qwen/Qwen2\.5-7B-Instruct"):
        draft(asked("Qwen/Qwen2.5-7B"))
    (tmp_path / "llama-mini/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="no teacher family for model_type 'gpt2'"):
        draft(asked(str(tmp_path / "llama-mini")))


def test_machines() -> None:
    assert parse_gpus("8xH100") == (8, "H100", None)
    assert parse_gpus("h200") == (1, "h200", None)
    assert parse_gpus("2 x RTX 4090") == (2, "RTX 4090", None)
    assert parse_gpus("2x48GB") == (2, "", 48.0)
    assert parse_gpus("80GiB") == (1, "", 80.0)
    assert parse_gpus("cpu") == (0, "", None)
    for text in ("", "0xH100", "99999xH100", "8", "x;rm", "2x0GB"):
        with pytest.raises(UserError, match="--gpus"):
            parse_gpus(text)
    for kind in GPU_KINDS:
        machine = machine_of(asked("x", gpus=2, gpu=kind.lower().replace(" ", "")))
        assert machine.gpu == kind
        assert machine.resources.dollars_per_gpu_hour
        assert machine.slower > 0
    assert machine_of(asked("x", gpu="H100")).slower == 1.0
    assert machine_of(asked("x", gpu="A100", price=1.0)).slower == pytest.approx(989 / 312)
    with pytest.raises(UserError, match=r"'H10' is no GPU.*did you mean 'H100'"):
        machine_of(asked("x", gpu="H10"))
    with pytest.raises(UserError, match="memory of the GPUs is not known"):
        machine_of(asked("x", gpu=""))


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "mine.yaml"
    _write(place, "first")
    with pytest.raises(UserError, match=r"mine\.yaml was written meanwhile; give another file with --out"):
        _write(place, "second")
    assert place.read_text() == "first"


def test_names() -> None:
    assert recipe_name("Qwen/Qwen3-8B", True) == "qwen3-8b-hybrid"
    assert recipe_name("/models/My Model v2/", False) == "my-model-v2-pure"
    assert recipe_name("SmolLM2.Q4_1.gguf", False) == "smollm2.q4-1-pure"


@pytest.mark.parametrize("parameters", [1e6, 1.3e8, 1.7e9, 4e9, 8e9, 3.2e10])
def test_more_effort_is_more_tokens_and_rates_fall_with_size(parameters: float) -> None:
    known = efforts(int(parameters))
    assert [effort.tokens for effort in known] == sorted(effort.tokens for effort in known)
    assert any(effort.name == "usual" for effort in known)
    for hybrid in (True, False):
        now, larger = rates(int(parameters), hybrid=hybrid), rates(int(3 * parameters), hybrid=hybrid)
        assert larger.mixers[0] <= now.mixers[0]
        assert now.mixers[1] <= now.mixers[0]
