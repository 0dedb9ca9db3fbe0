"""Runs lm-evaluation-harness tasks through its API on a loaded model, split over the ranks."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as templates
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import resolve_task_folder
from radlads.tasks.contracts.recipe.sections import EvalTask
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.batching.row_scores import ScoredRow, batches_of, run_halving, score_rows
from radlads.tasks.jobs.judge.divided import in_step
from radlads.tasks.jobs.judge.task_datasets import PinnedFactory, check_commits, named_datasets
from radlads.tasks.jobs.process_group import gather
from radlads.tasks.jobs.sources import first_line

logger = logging.getLogger("radlads")

# The harness compiles a task's templates again for every item, which takes longer than to tokenize it.
templates.from_string = cache(templates.from_string)

_ALL = 2**31  # rows that the harness hands over at once; passes are made of them here
# Bootstrap samples for metrics without a closed-form standard error (perplexity).
_BOOTSTRAP = 1000


class SharedHFLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face adapter around a loaded model: the scores equal those of `lm_eval --model hf` for the
    same model and tokenizer, up to rounding.

    add_bos: the harness's `add_bos_token`; None leaves BOS to the tokenizer, as in the harness. Every rank builds all
    requests and computes its share; the responses are gathered, so every rank computes the same scores for any number
    of ranks. The harness itself sees a single process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        budget: RowBudget,
        max_length: int,
        add_bos: bool | None,
        rank: int,
        num_ranks: int,
    ) -> None:
        self._encoded: dict[tuple[str, bool | None, int | None], list[int]] = {}
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=budget.rows or _ALL,
            max_length=max_length,
            add_bos_token=add_bos,
        )
        self._budget = budget
        self._own_rank = rank
        self._num_ranks = num_ranks

    @property
    def begins_with_bos(self) -> bool:
        """Whether a prompt begins with BOS."""
        return self.tokenizer.bos_token_id is not None and self.tok_encode("a")[:1] == [self.tokenizer.bos_token_id]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        key = string, add_special_tokens, left_truncate_len
        ids = self._encoded.get(key)
        if ids is None:
            ids = self._encoded[key] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return list(ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._share(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._share(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if self._budget.rows is None and requests:
            self.batch_size_per_gpu = self._budget.writes(max(map(self._written, requests)))
        answers = self._share(super().generate_until, requests)
        self.batch_size_per_gpu = self._budget.rows or _ALL
        return answers

    def _written(self, request: Instance) -> int:
        """Tokens of a prompt and its answer, at most."""
        text, options = request.args
        new_tokens = options.get("max_gen_toks", self.max_gen_toks)
        longest: int = min(len(self.tok_encode(text)) + new_tokens, self.max_length)
        return longest

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As the harness's, but that logits are made of the continuations' positions alone, and passes take rows by
        their tokens. Requests whose rows are the same (answers of one token to one question) are read once; each gets
        the scores of its own positions, also where one has more tokens than another, in which the harness errs."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            given = (context + continuation)[-(self.max_length + 1) :]  # as the harness: from the left
            rows.setdefault(tuple(given[:-1]), []).append(index)
        scored = [ScoredRow(ids, tuple(tuple(requests[i][2]) for i in own)) for ids, own in rows.items()]
        members = list(rows.values())
        answers: dict[int, tuple[float, bool]] = {}
        for chosen in batches_of([len(row.ids) for row in scored], self._budget.reads):
            for number, found in zip(chosen, self._read([scored[i] for i in chosen]), strict=True):
                for index, (scores, largest) in zip(members[number], found, strict=True):
                    answers[index] = float(scores.sum()), largest
        return [answers[index] for index in range(len(requests))]

    def _read(self, rows: Sequence[ScoredRow]) -> list[list[tuple[torch.Tensor, bool]]]:
        return run_halving(self.model, rows, lambda part: score_rows(self.model, part, self.softmax_dtype))

    def _share(self, respond: Callable[..., list[Any]], requests: list[Instance]) -> list[Any]:
        mine = requests[self._own_rank :: self._num_ranks]
        responses: list[Any] = [None] * len(requests)
        with in_step(self.model):
            own = respond(mine, disable_tqdm=True) if mine else []
        self._encoded.clear()  # the choices of an item have its context in common
        for rank, part in enumerate(gather(own, self._num_ranks)):
            responses[rank :: self._num_ranks] = part
        return responses


def max_length_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Maximum sequence length that the harness uses for a model, in tokens."""
    return int(resolve_max_length(model.config, tokenizer))


def check_tasks(tasks: Sequence[EvalTask], commits: Sequence[Mapping[str, str]] = ()) -> list[str]:
    """Errors of the tasks, one line each. Tasks with a path are built, others are looked up by name.

    commits: for each task, as in run_task.
    """
    faults: list[str] = []
    for index, task in enumerate(tasks):
        if task.path is not None:
            try:
                _load_offline(task, commits[index] if commits else {})
            except UserError as error:
                faults.append(f"evaluate.tasks: {error}")
        elif task.name not in _shipped().task_index:
            faults.append(f"evaluate.tasks: the harness has no task '{task.name}'; set `path` for a task of your own")
    return faults


def hub_datasets(task: EvalTask) -> dict[str, str | None]:
    """Hub id → revision (None: not given) of each dataset that the task reads."""
    if task.path is None:
        return named_datasets(_shipped(), task.name, None)
    return named_datasets(_offline_manager(task), task.name, resolve_task_folder(task.path))


def run_task(
    lm: SharedHFLM, task: EvalTask, *, seed: int, commits: Mapping[str, str] | None = None
) -> dict[str, dict[str, float | None]]:
    """Metric → {value, stderr} of a task; `subtask/metric` for a group. Collective; the same result on every rank.

    commits: hub dataset → commit to read it at.
    """
    commits = commits or {}
    loaded = _load_offline(task, commits) if task.path else _load_shipped(task, commits)
    for built in loaded["tasks"].values():
        check_commits(task.name, built, commits)
    return flatten(task.name, run_loaded(lm, loaded, task.num_fewshot, task.limit, seed=seed)["results"])


def run_loaded(
    lm: SharedHFLM, loaded: Any, num_fewshot: int | None, limit: int | None, *, seed: int, with_items: bool = False
) -> dict[str, Any]:
    """The harness's results of a TaskDict. Collective; the same result on every rank.

    num_fewshot: None: as its YAML has it. with_items: also `samples`, the requests and scores of each item, by task.
    """
    for built in loaded["tasks"].values():
        shots = built.get_config("num_fewshot") if num_fewshot is None else num_fewshot
        built.set_config(key="num_fewshot", value=shots or 0)
        built.set_fewshot_seed(seed=seed)
    # Tasks may use any of the three generators.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # Not simple_evaluate: it indexes all shipped tasks and collects machine details on every call.
    results: dict[str, Any] = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=with_items,
    )
    return results


@cache
def _shipped() -> TaskManager:
    """The harness's own tasks; indexing them takes about ten seconds."""
    return TaskManager()


def _load_shipped(task: EvalTask, commits: Mapping[str, str]) -> Any:
    manager = _shipped()
    manager._factory = PinnedFactory(commits)
    return manager.load([task.name])


def _offline_manager(task: EvalTask) -> TaskManager:
    """A harness index of one task folder. Raises UserError."""
    try:
        folder = resolve_task_folder(task.path or "")
    except UserError as error:
        raise UserError(f"task '{task.name}': {error}") from error
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if task.name not in manager.task_index:
        present = ", ".join(manager.all_tasks) or "none"
        raise UserError(f"task '{task.name}': no YAML file in {folder} defines it; tasks there: {present}")
    return manager


def _load_offline(task: EvalTask, commits: Mapping[str, str]) -> Any:
    """The harness's TaskDict of a task folder; data paths in its YAML are relative to that folder."""
    manager, folder = _offline_manager(task), resolve_task_folder(task.path or "")
    manager._factory = PinnedFactory(commits)
    with contextlib.chdir(folder):
        try:
            return manager.load([task.name])
        except Exception as error:  # a task file can raise anything, from YAML to datasets
            raise UserError(f"task '{task.name}' in {folder} cannot be built: {first_line(error)}") from error


def flatten(name: str, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Metric → {value, stderr} of the harness's `results` for a task; `subtask/metric` for the tasks of a group."""
    flat: dict[str, dict[str, float | None]] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            label = metric if filtered == "none" else f"{metric},{filtered}"
            error = metrics.get(f"{metric}_stderr,{filtered}")
            flat[label if task == name else f"{task}/{label}"] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
            }
    return flat
