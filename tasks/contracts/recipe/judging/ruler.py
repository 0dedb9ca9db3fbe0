"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654), and how a recipe asks for them."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import Length, Place, Reads, Section, Seed

OneNeedle = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
]
"""Tasks with one needle to find, whose answer is one text."""
SyntheticTask = Literal[OneNeedle, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"]
"""Tasks whose prompts are generated: needles, variable tracking, common words, frequent words."""
RulerTask = SyntheticTask | Literal["qa_1", "qa_2"]
SYNTHETIC_TASKS: tuple[SyntheticTask, ...] = get_args(SyntheticTask)


class Ruler(Section):
    """RULER, judged by generation beside the needles, with the answer prefixes and scores of the publication."""

    tasks: tuple[RulerTask, ...] = ()
    """Empty: all that have what they need: eleven, and qa_1 with `squad`, qa_2 with `hotpotqa`. The report names those
    that were left out."""
    lengths: tuple[Length, ...] = Field(default=(1024, 2048, 4096), min_length=1)
    """In tokens: of prompt and answer together."""
    samples: int = Field(default=20, ge=5, le=10_000)
    """Prompts of each task and length; the publication has 500. Source: 500 in the publication (2404.06654)."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    """Text files with the essays that hide needles; empty: the haystack of the section `needle`."""
    haystack_separator: str | None = None
    """As `separator` of `files`, for the haystack."""
    squad: Annotated[Place | None, Reads("files")] = None
    """File with the questions of qa_1, as jsonl: {context, question, answers}, SQuAD's rows, or SQuAD's own file."""
    hotpotqa: Annotated[Place | None, Reads("files")] = None
    """Likewise for qa_2; a context may be a list of documents, or HotpotQA's [[title, sentences], ...]."""
    chat: bool = False
    """Put the prompt into a user message with the tokenizer's chat template; the answer prefix begins the reply."""
    seed: Seed = 1234
    """Of the prompts."""

    @model_validator(mode="after")
    def _tasks_have_questions(self) -> Self:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("tasks has a task twice")
        for task, key, file in (("qa_1", "squad", self.squad), ("qa_2", "hotpotqa", self.hotpotqa)):
            if task in self.tasks and file is None:
                raise ValueError(f"{task} needs a file with questions; give it as {key}, or leave the task out")
            if self.tasks and file is not None and task not in self.tasks:
                raise ValueError(f"{key} is the file of {task}, which is not among the tasks; name it or drop the file")
        return self

    @property
    def judged(self) -> tuple[RulerTask, ...]:
        """The tasks that are judged."""
        questions: list[RulerTask] = ["qa_1"] if self.squad else []
        questions += ["qa_2"] if self.hotpotqa else []
        return self.tasks or (*SYNTHETIC_TASKS, *questions)

    @property
    def left_out(self) -> dict[str, str]:
        """Task that is not judged → why."""
        why = {"qa_1": "no question file (squad)", "qa_2": "no question file (hotpotqa)"}
        named = (*SYNTHETIC_TASKS, *why)
        return {
            task: "not among needle.ruler.tasks" if self.tasks else why[task]
            for task in named
            if task not in self.judged
        }
