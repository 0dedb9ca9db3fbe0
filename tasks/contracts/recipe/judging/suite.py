"""The benchmarks of `evaluate.suite`: names, and the section."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import Place, Reads, Section

SuiteTask = Literal[
    "lambada_openai",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "hellaswag",
    "winogrande",
    "boolq",
    "openbookqa",
    "commonsense_qa",
    "copa",
    "mmlu",
    "gsm8k",
]
"""Tasks under the harness's names."""


class EvalSuite(Section):
    """Benchmarks of the lm-evaluation-harness whose data are local files (docs/evaluation.md), scored over chance."""

    path: Annotated[Place, Reads("task")]
    """Folder with one file a task."""
    tasks: tuple[SuiteTask, ...] = Field(default=get_args(SuiteTask), min_length=1)
    """Names of the harness's tasks."""
    limit: int | None = Field(default=None, gt=0)
    """Items of each task (MMLU: of each subject), for trials; None: all."""
    num_fewshot: dict[SuiteTask, int] = Field(default_factory=dict)
    """Examples in the prompt, for tasks whose number is not to be the harness's own (GSM8K: 5, others: 0)."""

    @model_validator(mode="after")
    def _tasks_are_sane(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks has a task twice")
        for name, shots in self.num_fewshot.items():
            if name not in self.tasks or not 0 <= shots <= 100:
                raise ValueError(f"num_fewshot: '{name}: {shots}' is not from 0 to 100, or the task is not in `tasks`")
        return self
