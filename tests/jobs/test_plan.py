"""plan: the numbers it gives, and every fault it must find before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import pin_teacher
from radlads.tasks.contracts.recipe.recipe import Recipe, parse_recipe
from radlads.tasks.contracts.specs import PlanReport, PlanSpec, spec_digest
from radlads.tasks.jobs.checkpoints import host_copy
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.plan import memory, plan
from radlads.tasks.stage_specs import choose_spec, needle_spec, tokenize_spec

CPU = JobResources(device="cpu", processes=1, threads=1)
CHAT = '{"m": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'
GPUS = JobResources(device="cuda", processes=8, threads=4, zero_stage=1, dollars_per_gpu_hour=2.0)


@pytest.fixture
def recipe(teacher_folder: Path, tmp_path: Path, stories: list[str]) -> Callable[..., Recipe]:
    """recipe(**changes): a recipe that is right, with dotted changes."""
    (tmp_path / "stories.txt").write_text("\n---\n".join(stories))
    training = {"tokens": 4096, "context": 64, "batch": 4, "micro_batch": 2}
    raw = {
        "name": "tiny",
        "teacher": {"path": str(teacher_folder)},
        "student": {"attention_layers": [1]},
        "data": {"train": {"sources": [{"kind": "files", "paths": [str(tmp_path / "*.txt")], "separator": "\n---\n"}]}},
        "align": training,
        "distill": training,
        "finetune": training,
        "evaluate": {"context": 64},
        "needle": {"lengths": [200, 300]},
    }

    def make(**changes: Any) -> Recipe:
        changed = json.loads(json.dumps(raw))
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            node = changed
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
            node[last] = value
        return parse_recipe(changed)

    return make


def test_a_good_recipe_is_added_up(
    recipe: Callable[..., Recipe], make_job: Callable[..., Job], run_main: Any, stories: list[str]
):
    job = make_job("plan", PlanSpec(recipe=recipe()))
    manifest = run_main(plan.main, job)
    report = PlanReport.model_validate_json((Path(job.spec.output_uri) / "plan.json").read_text())
    assert report.teacher is not None
    assert report.teacher_parameters < report.student_parameters
    assert report.student_parameters - report.teacher_parameters < report.mixer_parameters
    assert report.num_layers == 2
    assert report.attention_layers == (1,)
    assert list(report.stages) == [
        "tokenize train", "transplant", "align", "distill", "finetune", "evaluate", "needle", "publish"
    ]  # fmt: skip
    distill = report.stages["distill"]
    assert distill["steps"] == 16
    assert distill["tokens"] == 4096
    assert distill["memory_bytes_per_gpu"]["weights"] == 4 * report.student_parameters
    assert distill["memory_bytes_per_gpu"]["optimizer"] == 12 * report.student_parameters
    assert distill["checkpoint"] == dict.fromkeys(("bytes", "host_bytes"), 12 * report.student_parameters)
    assert report.stages["align"]["trainable_parameters"] == report.mixer_parameters
    size = sum(len(s.encode()) for s in stories)
    assert report.data["train"]["bytes"] == pytest.approx(size, rel=0.05)
    assert 2 < report.data["train"]["bytes_per_token"] < 8
    assert [Path(f.path).name for f in report.pins["data.train.sources.0.paths"].files] == ["stories.txt"]
    assert report.dollars is None
    assert manifest.metrics["student_parameters"] == report.student_parameters


def test_everything_that_is_read_is_pinned(recipe: Callable[..., Recipe], tmp_path: Path, teacher_folder: Path):
    hay = [str(tmp_path / "stories.txt")]
    choice = {"count": 1, "choose": "recall", "recall": {"haystack": hay, "lengths": [128], "documents": 4}}
    (tmp_path / "evals").mkdir()
    item = {"query": "Tim sat, because", "choices": ["he ran.", "he fell."], "gold": 1}
    (tmp_path / "evals" / "copa.jsonl").write_text(json.dumps(item))
    question = json.dumps({"messages": [{"role": "user", "content": "Who?"}]}) + "\n"
    (tmp_path / "q.jsonl").write_text(2 * question)
    asked = recipe(
        evaluate__suite={"path": str(tmp_path / "evals"), "tasks": ["copa"]},
        evaluate__generation={"prompts": hay, "new_tokens": 64, "instructions": {"paths": [str(tmp_path / "q.jsonl")]}},
        needle__haystack=hay,
        student__attention_layers=choice,
        data__unused={"sources": [{"kind": "files", "paths": ["nowhere.txt"]}]},
        distill__tokens=10**7,
    )
    report = plan.make_plan(asked, CPU)
    where = {
        "teacher.path",
        "data.train.sources.0.paths",
        "evaluate.suite.path",
        "evaluate.generation.prompts",
        "evaluate.generation.instructions.paths",
        "needle.haystack",
        "student.attention_layers.recall.haystack",
    }
    assert set(report.pins) == where
    assert [file.path for file in report.pins["evaluate.suite.path"].files] == ["copa.jsonl"]
    assert report.teacher == pin_teacher(str(teacher_folder))
    assert report.pins["teacher.path"].content == report.teacher.fingerprint
    assert report.tokenizer_fingerprint == report.teacher.tokenizer_fingerprint
    specs = [tokenize_spec(asked, report, "train"), needle_spec(asked, report), choose_spec(asked, report)]
    assert [list(spec.pins) for spec in specs if spec is not None] == [
        ["dataset.sources.0.paths"], ["section.haystack"], ["section.recall.haystack"]
    ]  # fmt: skip
    for spec in specs:
        assert spec_digest("plan", spec, {})


def test_nothing_is_read_whole_before_all_else_is_checked(recipe: Callable[..., Recipe]):
    class Unread(ContentHashes):
        def of_all(self, paths: Any) -> list[str]:
            pytest.fail("hashed")

    with pytest.raises(UserError, match=r"align\.tokens"):
        plan.make_plan(recipe(align__tokens=64), CPU, hashes=Unread())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__variant": "rad_rwkv9"}, "no mixer variant named 'rad_rwkv9'; did you mean 'rad_rwkv7'"),
        ({"student__options": {"balanced": 3, "nonsense": 1}}, "nonsense"),
        ({"student__attention_layers": [7]}, "layer 7, but the teacher has the layers 0 to 1"),
        ({"teacher__path": "/nowhere/at/all"}, "there is no teacher folder at /nowhere/at/all"),
        ({"data__train__sources__0__paths": ["gone-*.txt"]}, "data.train.sources.0: no file matches 'gone-"),
        ({"data__train__add_bos": True, "align__context": 4096}, "align.context .4096. is beyond the 512 positions"),
        (
            {"data__train__sources": [{"kind": "sample", "tokens": 9999, "context": 4096}]},
            r"data\.train\.sources\.0\.context \(4096\) is beyond the 512 positions",
        ),
        ({"align__tokens": 100}, "align.tokens .100. is less than one step"),
        ({"finetune__assistant_only": True}, "no source of data.train has messages_field"),
        ({"needle__lengths": [10]}, "needle: a needle prompt of 10 tokens is too short"),
        ({"needle__depths": [1.5]}, "needle: depths are shares from 0 to 1"),
        (
            {"distill__lora": {"targets": ["qproj"]}},
            "distill.lora.targets: no layer has a linear module 'qproj'; there",
        ),
        ({"evaluate__tasks": [{"name": "no_such_task"}]}, "the harness has no task 'no_such_task'"),
        ({"evaluate__tasks": [{"name": "t", "path": "/nowhere"}]}, "there is no folder /nowhere"),
        ({"evaluate__suite": {"path": "/nowhere", "tasks": ["copa"]}}, "evaluate.suite: there is no folder /nowhere"),
        ({"evaluate__generation": {"prompts": ["/no.txt"]}}, "evaluate.generation: no file matches '/no.txt'"),
    ],
)
def test_faults_are_one_clear_line(recipe: Callable[..., Recipe], changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        plan.make_plan(recipe(**changes), CPU)
    assert all(len(line) < 400 for line in str(caught.value).splitlines())
    several = {"student__options", "align__context"} & set(changes)
    assert len(str(caught.value).splitlines()) == (2 if several else 1)


@pytest.mark.parametrize(
    ("rows", "source", "message"),
    [
        ('{"m": [{"role": "user"}]}', {}, "chats.jsonl, line 1, message 1: the user message has no content"),
        ('{"m": [{"role": "assistant", "content": "Yo"}]}', {}, "line 1: the chat begins with the assistant"),
        ('{"n": 1}', {}, "line 1 has no field 'm'; it has: n"),
        (CHAT, {"chat_template": "qwen-3"}, "no chat template 'qwen-3'"),
        (CHAT, {"chat_template": "qwen3"}, "qwen3 is not for this tokenizer"),
        (CHAT, {"chat_template": "mine.jinja"}, r"the chat template mine\.jinja cannot be read"),
    ],
)
def test_chats_that_cannot_be_used_are_told_with_their_place(
    recipe: Callable[..., Recipe], tmp_path: Path, rows: str, source: dict[str, str], message: str
):
    (tmp_path / "chats.jsonl").write_text(rows)
    chats = {"kind": "files", "paths": [str(tmp_path / "chats.jsonl")], "messages_field": "m", **source}
    with pytest.raises(UserError, match=rf"data\.train\.sources\.0: .*{message}") as caught:
        plan.make_plan(recipe(data__train__sources=[chats]), CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_the_text_of_special_tokens_in_the_data_is_warned_of(recipe: Callable[..., Recipe], tmp_path: Path):
    (tmp_path / "one.txt").write_text("Once upon a time.<eos>" * 9)
    one = {"kind": "files", "paths": [str(tmp_path / "one.txt")]}
    warned = plan.make_plan(recipe(data__train__sources=[one]), CPU).warnings
    assert any("data.train.sources.0" in line and "9 times" in line and "set separator" in line for line in warned)
    quiet = [{**one, "separator": "<eos>"}, {**one, "special_tokens": "parse"}]
    assert not any("special" in line for line in plan.make_plan(recipe(data__train__sources=quiet), CPU).warnings)


def test_a_model_that_cannot_teach_is_refused_before_its_files_are_missed(
    recipe: Callable[..., Recipe], tmp_path: Path
):
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "liger_qwen3", "architectures": ["LigerQwen3ForCausalLM"]}')
    with pytest.raises(UserError, match="is a linear-attention model already") as caught:
        plan.make_plan(recipe(teacher__path=str(folder)), CPU)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("way", "layers"), [("even", (1,)), ("last", (1,)), ("difficulty", ()), ("recall", ())])
def test_a_choice_is_planned(recipe: Callable[..., Recipe], way: str, layers: tuple[int, ...]):
    tokens = {f"{stage}__tokens": 400_000 for stage in ("align", "distill", "finetune")}
    probe = {"recall": {"lengths": [128], "context": 64}} if way == "recall" else {}
    report = plan.make_plan(recipe(student__attention_layers={"count": 1, "choose": way, **probe}, **tokens), CPU)
    assert report.attention_layers == layers
    assert (report.choice is None) == bool(layers)
    assert list(report.stages)[2:-1] == [
        "align",
        *(() if layers else ("choose",)),
        "distill",
        "finetune",
        "evaluate",
        "needle",
    ]
    if way == "recall":
        assert 0 < report.stages["choose"]["tokens"] <= 0.05 * 1_200_000
        assert report.choice.recall.documents < 128
        assert report.stages["choose"]["memory_bytes_per_gpu"]["total"] > 0


def test_a_probe_of_needles_is_planned_with_what_can_be_known(recipe: Callable[..., Recipe]):
    sizes = {f"{stage}__tokens": 2_000_000 for stage in ("align", "distill", "finetune")}
    choice = {"count": 1, "choose": "recall", "search": "one_at_a_time", "probe": {"tasks": ["niah_single_1"]}}
    choice["recall"] = {"lengths": [480], "documents": 16, "context": 64, "heldout_tokens": 640}
    report = plan.make_plan(recipe(student__attention_layers=choice, **sizes), CPU)
    assert report.choice is not None
    assert report.stages["choose"]["tokens"] == (1 + 2 + 1 + 2) * (16 * 480 + 640)
    assert [text for text in report.warnings if "80% of 16 answers, with a standard error of 10 points" in text]
    short = choice | {"recall": {"lengths": [64], "context": 64}}
    with pytest.raises(UserError, match="niah_single_1 does not fit in 64 tokens"):
        plan.make_plan(recipe(student__attention_layers=short, **sizes), CPU)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"count": 2, "choose": "even"}, "student: attention_layers.count is 2, of 2 layers: keep at least 1"),
        ({"count": 9, "choose": "recall"}, "student: attention_layers.count is 9, of 2 layers"),
        ({"count": 2, "choose": "difficulty"}, "student: attention_layers.count is 2, of 2 layers"),
        (
            {"count": 1, "choose": "recall"},
            "student: choosing 1 of 2 layers by recall takes 4 passes, and 5% of the run's",
        ),
        (
            {"count": 1, "choose": "recall", "recall": {"lengths": [20], "context": 16, "heldout_tokens": 64}},
            "is too short for its fact and question",
        ),
        (
            {"count": 1, "choose": "recall", "recall": {"lengths": [64], "context": 1024}},
            "sequences of 1024 tokens, but the teacher has 512 positions",
        ),
    ],
)
def test_choices_that_cannot_be_are_one_clear_line(recipe: Callable[..., Recipe], choice: dict[str, Any], message: str):
    enough = {} if "recall" not in choice else {"align__tokens": 2_000_000}
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        plan.make_plan(recipe(student__attention_layers=choice, **enough), CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_all_faults_are_told_at_once(recipe: Callable[..., Recipe]):
    bad = recipe(student__variant="none", align__tokens=10, needle__lengths=[5])
    with pytest.raises(UserError) as caught:
        plan.make_plan(bad, CPU)
    assert len(str(caught.value).splitlines()) == 3


def test_sequences_too_short_for_a_spectrum_are_told(recipe: Callable[..., Recipe]):
    asked = {"align__loss": "comprehensive", "align__comprehensive": {"revision": "svd"}}
    with pytest.raises(UserError, match=r"^align.comprehensive.revision svd .* \(8 tokens\), and context is 7"):
        plan.make_plan(recipe(align__context=7, **asked), CPU)
    plan.make_plan(recipe(align__context=8, **asked), CPU)


def test_a_student_without_a_mixer_has_nothing_to_align(recipe: Callable[..., Recipe]):
    with pytest.raises(UserError, match=r"attention_layers keeps all 2 layers, so there is nothing to align"):
        plan.make_plan(recipe(student__attention_layers=[0, 1]), CPU)
    plan.make_plan(recipe(student__attention_layers=[1]), CPU)


def test_batch_must_divide_over_processes(recipe: Callable[..., Recipe]):
    with pytest.raises(UserError, match=r"align.batch \(4\) must be a multiple of the number of processes \(3\)"):
        plan.make_plan(recipe(), JobResources(device="cpu", processes=3, threads=1))


def test_wrong_fields_are_told_with_those_that_exist(recipe: Callable[..., Recipe], tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "hello there", "id": 3}\n')
    with pytest.raises(UserError, match="no field 'text'; it has: body, id"):
        plan.make_plan(recipe(data__train__sources=[{"kind": "files", "paths": [str(tmp_path / "a.jsonl")]}]), CPU)


def test_what_cannot_fit_is_refused_with_what_would_help(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    tiny = {"device": "Tiny GPU", "kind": "CPU", "processes": 1, "peak_flops": 1e12, "memory_bytes": 616 << 20}
    monkeypatch.setattr(plan, "describe_device", lambda resources: tiny)
    with pytest.raises(
        UserError, match=r"distill needs about .* which has .*what would help: .*distill.gradient_checkpointing"
    ):
        plan.make_plan(recipe(), CPU)


def test_epochs_and_long_contexts_are_warned_about(recipe: Callable[..., Recipe]):
    report = plan.make_plan(recipe(finetune__tokens=500_000, needle__lengths=[600]), CPU)
    assert any("finetune reads 500000 tokens" in w and "epochs" in w for w in report.warnings)
    assert any("needle.lengths [600]" in w for w in report.warnings)
    assert any("evaluate.heldout_tokens is 65536" in w for w in report.warnings)
    assert report.stages["finetune"]["epochs"] > 10


def test_host_memory_without_room_for_a_checkpoint_is_warned_about(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    asked, two = recipe(distill__batch=4), JobResources(device="cpu", processes=2, threads=1)
    monkeypatch.setattr(host_copy, "spare_memory", lambda: 1 << 40)
    report = plan.make_plan(asked, two)
    size = report.stages["distill"]["checkpoint"]["bytes"]
    assert report.stages["distill"]["checkpoint"]["host_bytes"] == size // 2
    assert not any("host memory" in warning for warning in report.warnings)
    monkeypatch.setattr(host_copy, "spare_memory", lambda: size)
    assert any("distill: host memory has no room" in warning for warning in plan.make_plan(asked, two).warnings)


def test_evaluate_needs_text_that_is_held_out(recipe: Callable[..., Recipe]):
    """The run would end at its last stage otherwise."""
    with pytest.raises(UserError, match=r"next to nothing of data.train is held out; raise its heldout_fraction"):
        plan.make_plan(recipe(data__train__heldout_fraction=1e-9), CPU)


def test_pretrain_is_planned_without_a_teacher(recipe: Callable[..., Recipe], tokenizer_folder: Path):
    raw = recipe().model_dump(mode="json")
    config = {
        "model_type": "qwen3",
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    section = {"tokens": 4096, "context": 64, "batch": 4, "config": config, "tokenizer": str(tokenizer_folder)}
    for key in ("teacher", "align", "distill", "finetune", "evaluate", "needle"):
        raw[key] = None
    report = plan.make_plan(parse_recipe(raw | {"pretrain": section}), CPU)
    assert report.teacher is None
    assert report.teacher_parameters == report.mixer_parameters == 0
    assert report.stages["pretrain"]["trainable_parameters"] == report.student_parameters
    section["config"] = config | {"vocab_size": 100}
    with pytest.raises(UserError, match="tokenizer has 400 tokens, but the model only 100"):
        plan.make_plan(parse_recipe(raw | {"pretrain": section}), CPU)


def test_the_published_7b_run_is_estimated_near_what_it_took(shared_data: Path, recipe: Callable[..., Recipe]):
    """2505.03005 table 3: step 2 of 7B, 500 M tokens on 8 × MI300X, took 5.5 hours = 44 GPU hours."""
    from transformers import AutoConfig

    from radlads.tasks.jobs.plan.cost import training_cost

    config = AutoConfig.for_model(**json.loads((shared_data / "configs" / "Qwen3-8B.json").read_text()))
    one = recipe(student__attention_layers=[], distill__tokens=500_000_000, distill__context=512, distill__batch=96)
    networks = plan.count_networks(one, config)
    assert one.distill is not None
    cost = training_cost("distill", one.distill, networks, "MI300X", GPUS)
    assert 35 < cost["gpu_hours"] < 55
    assert cost["speed"] == ("assumed: 15% of 1,307 TFLOP/s, the share of the published 7B run",)
    section = one.distill.model_copy(update={"micro_batch": 12, "gradient_checkpointing": True})
    need = memory.training_memory("distill", section, networks, GPUS)
    # Known to run with ZeRO-1 on cards of 80 GB at a smaller micro-batch, and of 192 GB at this one.
    assert 55e9 < need["total"] < 192e9
    assert need["weights"] == pytest.approx(2 * 8.4e9, rel=0.05)


def test_judging_counts_every_model_that_is_judged(recipe: Callable[..., Recipe]):
    """evaluate asks the teacher again beside each stage's student; needle asks it once, and two students at most."""
    whole, short = recipe(), recipe(align=None, finetune=None)
    assert whole.evaluate is not None
    assert whole.needle is not None
    assert all((whole.align, whole.distill, whole.finetune, short.distill))
    made, less = plan.make_plan(whole, CPU), plan.make_plan(short, CPU)
    stages, fewer = made.stages, less.stages
    assert stages["evaluate"]["flops"] == pytest.approx(2 * fewer["evaluate"]["flops"])
    asked, asked_less = stages["needle"]["flops"], fewer["needle"]["flops"]
    share = asked / asked_less
    assert 1.4 < share < 1.6, "a teacher and two students, where there were a teacher and one"


@pytest.mark.parametrize("chats", [3, 64])
def test_chats_in_which_the_assistant_is_silent_teach_nothing(
    recipe: Callable[..., Recipe], tmp_path: Path, chats: int
):
    """A fault where all of them were read, a warning where there may be others."""
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps({"m": [{"role": "user", "content": f"Where is ball {i}?"}]}) + "\n" for i in range(chats)]
    path.write_text("".join(lines))
    changes = {
        "data__chats": {"sources": [{"kind": "files", "paths": [str(path)], "messages_field": "m"}]},
        "finetune__data": "chats",
        "finetune__tokens": 256,
    }
    silent = "finetune.assistant_only is on, but the assistant says nothing in data.chats"
    if chats == 3:
        with pytest.raises(UserError, match=f"^{silent}: nothing would be learnt"):
            plan.make_plan(recipe(finetune__assistant_only=True, **changes), CPU)
    else:
        report = plan.make_plan(recipe(finetune__assistant_only=True, **changes), CPU)
        assert any(w.startswith(f"{silent}'s first 64 chats") for w in report.warnings)
    plan.make_plan(recipe(**changes), CPU)
    answer = {"m": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Here."}]}
    path.write_text("".join([*lines[1:], json.dumps(answer) + "\n"]))
    report = plan.make_plan(recipe(finetune__assistant_only=True, **changes), CPU)
    assert not any(silent in w for w in report.warnings)


@pytest.mark.parametrize(
    ("resources", "section", "told"),
    [
        (GPUS, {"distill__reset_at_documents": True}, "resources.cuda_graphs, distill: reset_at_documents"),
        (GPUS.model_copy(update={"zero_stage": 3}), {}, "resources.cuda_graphs, align: zero_stage: 3"),
        (CPU, {}, "only a GPU can replay passes"),
    ],
)
def test_what_cuda_graphs_exclude_is_a_fault(
    recipe: Callable[..., Recipe], resources: JobResources, section: dict[str, Any], told: str
):
    asked = resources.model_copy(update={"cuda_graphs": "on", "processes": 1, "gpu_memory_gib": 80.0})
    with pytest.raises(UserError, match=told):
        plan.make_plan(recipe(**section), asked)
    plan.make_plan(recipe(**section), asked.model_copy(update={"cuda_graphs": "auto"}))


def test_rulers_prompts_are_planned_and_their_files_pinned(recipe: Callable[..., Recipe], tmp_path: Path):
    (tmp_path / "questions.jsonl").write_text(
        '{"context": "It is blue.", "question": "Which?", "answers": ["blue"]}\n' * 9
    )
    ruler = {"haystack": [str(tmp_path / "stories.txt")], "tasks": ["niah_single_2", "fwe"], "lengths": [1000, 2000]}
    plain, judged = (plan.make_plan(recipe(**changes), CPU) for changes in ({}, {"needle__ruler": ruler}))
    assert judged.pins.keys() - plain.pins.keys() == {"needle.ruler.haystack"}
    flops, seconds = (
        [pick(report.stages["needle"]) for report in (plain, judged)]
        for pick in (lambda stage: stage["flops"], lambda stage: stage["seconds_by"]["judge"])
    )
    assert flops[1] > 2 * flops[0]
    assert seconds[1] > 2 * seconds[0]
    fixed = (plan.make_plan(recipe(needle__batch=8, **changes), CPU) for changes in ({}, {"needle__ruler": ruler}))
    longest = [report.stages["needle"]["memory_bytes_per_gpu"]["activations"] for report in fixed]
    assert 2000 / 300 < longest[1] / longest[0] < (2000 / 300) ** 2  # a row's mask grows with its length, the rest not
    (spec,) = [needle_spec(recipe(needle__ruler=ruler), judged)]
    assert list(spec.pins) == ["section.ruler.haystack"]
    short = ruler | {"tasks": ["qa_1"], "squad": str(tmp_path / "questions.jsonl"), "lengths": [300]}
    with pytest.raises(UserError, match=r"(?m)^needle\.ruler: qa_1: all 1 documents of its questions fill"):
        plan.make_plan(recipe(needle__ruler=short), CPU)


@pytest.mark.parametrize("chat", [True, False])
def test_recall_text_as_chats_serves_assistant_only(recipe: Callable[..., Recipe], chat: bool):
    source = {"kind": "recall", "documents": 9, "lengths": [700], "ruler": ["niah_single_1"], "chat": chat}
    changes: dict[str, Any] = {"data__sums": {"sources": [source]}, "finetune__data": "sums"}
    asked = recipe(**changes, finetune__assistant_only=True)
    if chat:
        assert plan.make_plan(asked, CPU).data["sums"]["assistant"] is True
    else:
        with pytest.raises(UserError, match=r"no source of data\.sums has messages_field \(or is recall with chat\)"):
            plan.make_plan(asked, CPU)
