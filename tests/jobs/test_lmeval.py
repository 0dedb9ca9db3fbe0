"""The harness's requests and scores through our adapter are those of the harness's own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import perplexity, stderr_for_metric
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.sections import Evaluate
from radlads.tasks.jobs.judge import evaluate
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.lmeval import SharedHFLM, max_length_of
from radlads.tasks.launchers.local import job_environment

STORY = "Once upon a time there was a little dog named Tim. " * 4
PAIRS = [
    ("Once upon a", " time"),
    ("Once upon a ", "time"),
    ("The dog", " was sad."),
    ("", "Tim liked"),
    ("<bos>Tim", " liked"),
    ("Tim <eos>", "<eos> ball"),
    (STORY, " park"),
]


@pytest.fixture
def model(teacher_folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    for parameter in model.parameters():  # so that what comes before a token changes its score
        parameter.data.normal_(0, 0.2)
    model.config.max_position_embeddings = 64
    return model


@pytest.fixture(params=["adds BOS", "adds none", "has none"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    if request.param == "adds BOS":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    if request.param == "has none":
        tokenizer.bos_token = None
    return tokenizer


class Recorder:
    """What an adapter hands to the model."""

    def __init__(self, lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lm = lm
        self.seen: list[Any] = []
        score, generate = lm._loglikelihood_tokens, lm._model_generate

        def scoring(requests: Any, **options: Any) -> Any:
            self.seen += [(list(context), list(continuation)) for _, context, continuation in requests]
            return score(requests, **options)

        def generating(context: torch.Tensor, **options: Any) -> Any:
            self.seen.append((context.tolist(), options["stop"], options["max_length"]))
            return generate(context, **options)

        monkeypatch.setattr(lm, "_loglikelihood_tokens", scoring)
        monkeypatch.setattr(lm, "_model_generate", generating)

    def answers(self, *, together: bool = True) -> dict[str, Any]:
        requests = [_request("loglikelihood", pair) for pair in PAIRS]
        until = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
        return {
            "loglikelihood": self.lm.loglikelihood(requests)
            if together
            else [self.lm.loglikelihood([one])[0] for one in requests],
            "rolling": self.lm.loglikelihood_rolling([_request("rolling", (text,)) for text in (STORY, "Tim")]),
            "generate": self.lm.generate_until(
                [_request("generate_until", (text, until)) for text in (STORY, "Tim liked", "<bos>The ball")]
            ),
        }


def _request(kind: str, arguments: tuple[Any, ...]) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("budget", [RowBudget(3), RowBudget(None, 150, 200), RowBudget(None, 9, 200)], ids=str)
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_requests_and_scores_are_the_harness_s(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, add_bos: bool | None, budget: RowBudget,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    theirs = Recorder(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, add_bos_token=add_bos), monkeypatch)
    # One by one: of two requests for the same row, of which one scores fewer tokens, the harness takes that one's
    # logits from the wrong positions (Collator.get_cache).
    expected = theirs.answers(together=False)
    ours = Recorder(
        SharedHFLM(
            model,
            tokenizer,
            budget=budget,
            max_length=max_length_of(model, tokenizer),
            add_bos=add_bos,
            rank=0,
            num_ranks=1,
        ),
        monkeypatch,
    )
    answers = ours.answers()
    assert answers["generate"] == expected["generate"]
    assert answers["rolling"] == pytest.approx(expected["rolling"], rel=1e-6)
    for own, other in zip(answers["loglikelihood"], expected["loglikelihood"], strict=True):
        assert own == (pytest.approx(other[0], rel=1e-6), other[1])
    if budget.rows:
        assert ours.seen == theirs.seen
    # The first two are one request: a space at a context's end goes to the continuation.
    assert len({score for score, _ in expected["loglikelihood"]}) == len(PAIRS) - 1


def test_the_tokenizers_habit_decides_and_the_numbers_say_so(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"q": "The dog", "a": " was sad."}\n{"q": "A ball", "a": " rolled."}\n')
    (folder / "one.yaml").write_text(
        "task: one\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: rows.jsonl\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list:\n  - metric: perplexity\n"
    )
    job: Any = SimpleNamespace(rank=0, world_size=1)
    tasks = ({"name": "one", "path": str(folder)},)
    habit = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    found = {}
    for add_bos in (None, True, False):
        section = Evaluate(tasks=tasks, add_bos=add_bos)
        job.typed = SimpleNamespace(section=section, pins={})
        sheet = evaluate.run_tasks(job, {"teacher": model, "student": model}, tokenizer, section, RowBudget(2))["one"]
        assert sheet["add_bos"] is add_bos
        assert sheet["begins_with_bos"] is (habit and add_bos is not False)
        found[add_bos] = sheet["teacher"]["perplexity"]["value"]
    assert found[None] == found[True]
    assert (found[None] != found[False]) is habit


def test_a_job_that_bootstraps_does_not_fork(monkeypatch: pytest.MonkeyPatch):
    environment = job_environment({}, JobResources(device="cpu", processes=1, threads=1))
    monkeypatch.setenv("DISABLE_MULTIPROC", environment["DISABLE_MULTIPROC"])
    monkeypatch.setattr(multiprocessing, "Pool", lambda *_: pytest.fail("forked"))
    assert stderr_for_metric(perplexity, 100)([-1.0, -2.0, -3.0]) > 0
