"""The harness's benchmarks over local files: its own YAML, with the dataset replaced and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import resolve_task_folder
from radlads.tasks.contracts.recipe.judging.suite import EvalSuite, SuiteTask
from radlads.tasks.jobs.judge.suite import columns
from radlads.tasks.jobs.judge.suite.files import OTHER_STEMS, examples_file, items_file, read_rows
from radlads.tasks.jobs.sources import first_line

_Rows = list[dict[str, Any]]
_ITEMS, _EXAMPLES = "items", "examples"  # splits
_WHOLE = ""  # the subject of all rows of a file without subjects


@dataclass(frozen=True)
class Benchmark:
    """Where the harness defines a task, and what its files and scores are."""

    folder: str
    """Of its YAML, in the harness's package."""
    forms: tuple[type[columns.Columns], ...]
    """Of rows: the harness's own columns first."""
    metric: str = "acc"
    """The main one, as the field reports it."""
    filter: str = "none"
    """The harness's filter of answers for that metric."""
    guessing: bool = True
    """Whether one of several choices is right, so that guessing finds it."""

    @property
    def label(self) -> str:
        """The main metric's name in results."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"


BENCHMARKS: Mapping[SuiteTask, Benchmark] = {
    "lambada_openai": Benchmark("lambada", (columns.Lambada, columns.LambadaCopy), guessing=False),
    "arc_easy": Benchmark("arc", (columns.ChoiceQuestion, columns.QuestionCopy)),
    "arc_challenge": Benchmark("arc", (columns.ChoiceQuestion, columns.QuestionCopy), "acc_norm"),
    "piqa": Benchmark("piqa", (columns.Piqa, columns.PiqaCopy), "acc_norm"),
    "hellaswag": Benchmark("hellaswag", (columns.HellaSwag, columns.HellaSwagCopy), "acc_norm"),
    "winogrande": Benchmark("winogrande", (columns.WinoGrande, columns.WinoGrandeCopy)),
    "boolq": Benchmark("super_glue/boolq", (columns.BoolQ, columns.BoolQCopy)),
    "openbookqa": Benchmark("openbookqa", (columns.QuestionStem, columns.QuestionStemCopy), "acc_norm"),
    "commonsense_qa": Benchmark("commonsense_qa", (columns.ChoiceQuestion, columns.CommonsenseCopy)),
    "copa": Benchmark("super_glue/copa", (columns.Copa, columns.CopaCopy)),
    "mmlu": Benchmark("mmlu/default", (columns.Mmlu,)),
    "gsm8k": Benchmark("gsm8k", (columns.Gsm8k,), "exact_match", "strict-match", guessing=False),
}


@dataclass
class LocalTask:
    """A built benchmark. loaded: the harness's TaskDict; notes: where prompts differ from the harness's own."""

    name: SuiteTask
    loaded: Any
    files: tuple[str, ...]
    num_fewshot: int
    notes: tuple[str, ...]

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]


def load_suite(suite: EvalSuite) -> tuple[list[LocalTask], list[str]]:
    """The tasks in the suite's order, and an error, one line each, for those that cannot be built."""
    built, faults = [], []
    try:
        folder = resolve_task_folder(suite.path)
    except UserError as error:
        return [], [f"evaluate.suite: {error}"]
    for name in suite.tasks:
        try:
            built.append(_load(name, folder, suite.num_fewshot.get(name)))
        except UserError as error:
            faults.append(f"evaluate.suite: {name}: {error}")
    return built, faults


def _load(name: SuiteTask, folder: Path, shots: int | None) -> LocalTask:
    benchmark = BENCHMARKS[name]
    stems = (name, *OTHER_STEMS.get(name, ()))
    path, more = items_file(folder, stems), examples_file(folder, stems)
    items, form = read_rows(path, benchmark.forms)
    # Only HellaSwag's two forms have different columns in the end.
    forms = (form,) if name == "hellaswag" else benchmark.forms
    examples = read_rows(more, forms)[0] if more is not None else None
    factory = _LocalFactory(path, items, examples, shots)
    if form is columns.HellaSwagCopy:
        factory.change(process_docs=None)
        factory.notes.append("the file has no activities, which the harness writes before each text")
    manager = TaskManager(include_path=_yaml_folder(benchmark.folder), include_defaults=False)
    manager._factory = factory
    try:
        loaded: Any = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # its templates and functions can raise anything
        raise UserError(f"{path}: the harness cannot build the task: {first_line(error)}") from error
    factory.check_all_used()
    files = (path.name, *((more.name,) if more is not None and factory.shots else ()))
    return LocalTask(name, loaded, files, factory.shots, tuple(dict.fromkeys(factory.notes)))


def _yaml_folder(name: str) -> str:
    return str(Path(lm_eval.tasks.__file__).parent / name)


class _RowsTask(ConfigurableTask):  # type: ignore[misc]
    """A task over rows in memory."""

    def __init__(self, splits: Mapping[str, _Rows], config: dict[str, Any]) -> None:
        self._splits = splits
        super().__init__(config=config)

    def download(self, *_: Any, **__: Any) -> None:
        self.dataset = {name: Dataset.from_list(rows) for name, rows in self._splits.items()}


class _LocalFactory(TaskFactory):  # type: ignore[misc]
    """Builds the tasks of a YAML file, or of a group, over the rows of one file; those of MMLU by their subject.

    shots: examples in the prompt, None: as the YAML has it. Without a file of examples they are other items.
    """

    def __init__(self, path: Path, items: _Rows, examples: _Rows | None, shots: int | None) -> None:
        super().__init__()
        self.shots = shots or 0
        self.notes: list[str] = []
        self._path, self._asked = path, shots
        self._items, self._examples = _by_subject(items), _by_subject(examples or [])
        self._changes: dict[str, Any] = {}
        self._used: set[str] = set()

    def change(self, **keys: Any) -> None:
        """Replace keys of the YAML."""
        self._changes |= keys

    def check_all_used(self) -> None:
        """Raises UserError for items of a subject without a task."""
        if left := sorted(self._items.keys() - self._used):
            raise UserError(f"{self._path}: the harness has no subject '{left[0]}'")

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> ConfigurableTask:
        config = self._load_full_config(entry, overrides) | self._changes
        for key in ("tag", "group", "task_list"):  # of the index, not of the task
            config.pop(key, None)
        subject = str(config["dataset_name"]) if _WHOLE not in self._items else _WHOLE
        items, examples = self._items.get(subject), self._examples.get(subject)
        if items is None:
            raise UserError(f"{self._path} has no items of the subject '{subject}'")
        self._used.add(subject)
        self.shots = config["num_fewshot"] = (config.get("num_fewshot") or 0) if self._asked is None else self._asked
        if config["task"] == "commonsense_qa":
            self._list_choices(config, [*items, *(examples or [])])
        splits = {_ITEMS: items}
        if self.shots:
            splits |= self._prompted(items, examples)
        split = _EXAMPLES if _EXAMPLES in splits else _ITEMS
        config |= {"training_split": None, "validation_split": None, "test_split": _ITEMS, "fewshot_split": split}
        return _RowsTask(splits, config)

    def _prompted(self, items: _Rows, examples: _Rows | None) -> dict[str, _Rows]:
        """The split of the examples, unless they are items."""
        if examples is None:
            self.notes.append("examples in the prompt are other items, as there is no file of examples")
        present = len(items) - 1 if examples is None else len(examples)
        if present < self.shots:
            raise UserError(f"{self._path}: {self.shots} examples are needed for a prompt, and there are {present}")
        return {} if examples is None else {_EXAMPLES: examples}

    def _list_choices(self, config: dict[str, Any], items: _Rows) -> None:
        """Leave out the letters of the prompt for which the items (with examples) have no choice."""
        letters, counts = config["doc_to_choice"], {len(item["choices"]["text"]) for item in items}
        count = max(counts)
        if len(counts) > 1 or count > len(letters):
            raise UserError(f"{self._path}: its items must all have the same number of choices, at most {len(letters)}")
        if count < len(letters):
            absent = tuple(f"{letter}. " for letter in letters[count:])
            lines = config["doc_to_text"].splitlines(keepends=True)
            config["doc_to_text"] = "".join(line for line in lines if not line.startswith(absent))
            config["doc_to_choice"] = letters[:count]
            self.notes.append(f"the file's items have {count} choices, those of the harness {len(letters)}")


def _by_subject(rows: _Rows) -> dict[str, _Rows]:
    subjects: dict[str, _Rows] = defaultdict(list)
    for row in rows:
        subjects[row.get("subject", _WHOLE)].append(row)
    return dict(subjects)
