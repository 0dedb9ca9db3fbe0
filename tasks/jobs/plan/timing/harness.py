"""How much the lm-evaluation-harness tasks of a recipe make a model read: from the sizes of the public test sets."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import resolve_task_folder
from radlads.tasks.contracts.recipe.sections import EvalTask, Evaluate
from radlads.tasks.jobs.judge.suite.files import count_items


@dataclass(frozen=True)
class TaskSize:
    """Of a task without examples in the prompt."""

    items: int
    requests: int
    """Of an item: one for each choice."""
    tokens: int
    """Of a request without examples, on average; an example in the prompt adds about as many."""
    generated: int = 0
    examples: int = 0
    """In the prompt, where a recipe does not say how many."""
    parts: int = 1
    """Subjects, each of which a limit holds for."""


_SIZES = {
    "arc_challenge": TaskSize(1172, 4, 45),
    "arc_easy": TaskSize(2376, 4, 40),
    "boolq": TaskSize(3270, 2, 140),
    "commonsense_qa": TaskSize(1221, 5, 60),
    "copa": TaskSize(100, 2, 20),
    "gsm8k": TaskSize(1319, 1, 150, generated=256, examples=5),
    "hellaswag": TaskSize(10042, 4, 110),
    "lambada_openai": TaskSize(5153, 1, 90),
    "lambada_standard": TaskSize(5153, 1, 90),
    "mmlu": TaskSize(14042, 4, 130, parts=57),
    "openbookqa": TaskSize(500, 4, 30),
    "piqa": TaskSize(1838, 2, 60),
    "winogrande": TaskSize(1267, 2, 35),
    "wikitext": TaskSize(62, 1, 4800),
}
_OTHER = TaskSize(2000, 4, 100)  # assumed of a task that is not listed


def task_sizes(section: Evaluate) -> list[TaskSize]:
    """Of all tasks; those of a suite have the items of its files, where they are on this machine."""
    found: dict[str, int] = {}
    if section.suite is not None:
        for name in section.suite.tasks:
            with suppress(UserError, OSError):  # told by the plan's checks
                found[name] = count_items(resolve_task_folder(section.suite.path), name)
    own = len(section.tasks)
    return [task_size(one, None if i < own else found.get(one.name)) for i, one in enumerate(section.all_tasks)]


def task_size(task: EvalTask, items: int | None = None) -> TaskSize:
    """Of a task with its examples and its limit. items: in its file; None: those of the public test set."""
    size = _SIZES.get(task.name, _OTHER)
    if items is not None:
        size = replace(size, items=items)
    items = size.items if task.limit is None else min(task.limit * size.parts, size.items)
    examples = size.examples if task.num_fewshot is None else task.num_fewshot
    return TaskSize(items, size.requests, size.tokens * (1 + examples), size.generated)
