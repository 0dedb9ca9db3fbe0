"""The recipe's section `evaluate`: scores of teacher and student, measured in one run."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, AddedLater, Place, Reads, Section, Seed
from radlads.tasks.contracts.recipe.judging.generation import EvalGeneration, EvalSpeed
from radlads.tasks.contracts.recipe.judging.suite import EvalSuite
from radlads.tasks.contracts.recipe.judging.texts import EvalText


class EvalTask(Section):
    """One lm-evaluation-harness task."""

    name: str
    """The harness's name of it."""
    path: Annotated[Place | None, Reads("task")] = None
    """Folder with the task's YAML file, for tasks that the harness does not ship and for offline use."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in a prompt; null: the task's own number."""
    limit: int | None = Field(default=None, gt=0)
    """Only so many items, for trials; null: all."""


class Evaluate(Section):
    """Evaluation of teacher and student in one run."""

    data: str = "train"
    """Dataset whose held-out text is scored."""
    heldout_tokens: int = Field(default=65536, gt=0)
    """Of the held-out text."""
    context: int = Field(default=512, gt=1)
    """Length of a window of it, in tokens."""
    batch: Annotated[int | None, OPERATIONAL] = Field(default=None, gt=0)
    """Rows at once; None: as many as fit, by their length."""
    tasks: tuple[EvalTask, ...] = ()
    """Tasks of the lm-evaluation-harness, with datasets of the hub."""
    texts: Annotated[tuple[EvalText, ...], AddedLater()] = ()
    """Texts beside the held-out ones, scored as a whole."""
    suite: Annotated[EvalSuite | None, AddedLater()] = None
    """Benchmarks from local files. Source: the tasks are those of lm-evaluation-harness."""
    generation: Annotated[EvalGeneration | None, AddedLater()] = None
    """What both models write."""
    speed: Annotated[EvalSpeed | None, AddedLater()] = None
    """Time and memory of both models."""
    add_bos: bool | None = None
    """Prepend BOS to task prompts, as `add_bos_token` of the harness's `hf` model. None: the tokenizer's default, which
    published scores use. Source: lm-evaluation-harness."""
    seed: Seed = 1234
    """Of the harness."""

    @model_validator(mode="after")
    def _tasks_have_one_name(self) -> Self:
        twice = {task.name for task in self.tasks} & set(self.suite.tasks if self.suite is not None else ())
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))}: in `tasks` and in `suite`; leave it out of one of them")
        names = [text.name for text in self.texts]
        if len(set(names)) < len(names):
            raise ValueError("texts has a name twice")
        return self

    @property
    def longest(self) -> int:
        """The longest row, in tokens, without those of harness tasks."""
        texts = (text.context for text in self.texts)
        return max(self.context, 0 if self.generation is None else self.generation.longest_row, *texts)

    @property
    def all_tasks(self) -> tuple[EvalTask, ...]:
        """Those of the suite too, without their files."""
        if self.suite is None:
            return self.tasks
        shots, limit = self.suite.num_fewshot, self.suite.limit
        return *self.tasks, *(EvalTask(name=n, num_fewshot=shots.get(n), limit=limit) for n in self.suite.tasks)
