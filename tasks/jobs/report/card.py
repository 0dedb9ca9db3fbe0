"""The model card of the exported student: README.md in its Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from radlads.model.mixers.shared.registry import mixer_class
from radlads.model.student.releases import TESTED
from radlads.tasks.contracts.pins.places import is_gguf
from radlads.tasks.contracts.recipe.recipe import dump_recipe
from radlads.tasks.contracts.recipe.sections import Recipe
from radlads.tasks.contracts.stages import CHOOSE, MODEL_STAGES, TRAINING_STAGES, stage_info
from radlads.tasks.jobs.report.choice_report import choice_summary, choice_table
from radlads.tasks.jobs.report.judged.speed_report import speed_table
from radlads.tasks.jobs.report.judged.suite_report import suite_table
from radlads.tasks.jobs.report.judged.writing_report import instructions_table, samples_table
from radlads.tasks.jobs.report.number_format import count, percent
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Code, Heading, Text, Verdict, render_markdown
from radlads.tasks.jobs.report.report_body import stages_table, summary_table, tasks_table
from radlads.tasks.jobs.report.retrieval.blocks import ruler_table

_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""


def write_card(products: Products, recipe: Recipe, verdicts: Sequence[Verdict], *, title: str) -> str:
    """README.md: YAML metadata, verdicts, numbers with sources, usage, training, limits, recipe."""
    blocks: list[Block] = [Text(_introduction(products, recipe)), *verdicts]
    makers = (
        summary_table,
        stages_table,
        suite_table,
        ruler_table,
        samples_table,
        instructions_table,
        speed_table,
        tasks_table,
        choice_table,
    )
    tables = [table(products) for table in makers]
    if any(table is not None for table in tables):
        blocks.append(Heading("Numbers"))
        blocks += [table for table in tables if table is not None]
    blocks += [
        Heading("Use"),
        Code(_USAGE, "python"),
        Text(
            f"It needs only `torch` and `transformers` (tested with {TESTED[0]} to {TESTED[1]}); the model's code is "
            "in this folder."
        ),
        Heading("How it was made"),
        *_making(products, recipe),
        Heading("Limits"),
        *_limits(products, recipe),
        Heading("Recipe"),
        Code(dump_recipe(recipe), "yaml", folded="The resolved recipe"),
    ]
    metadata = yaml.safe_dump(_metadata(recipe), sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n\n{render_markdown(title, blocks)}"


def teacher_name(recipe: Recipe) -> str:
    """The teacher's name, without local paths."""
    if recipe.teacher is None:
        return "nothing (trained from random weights)"
    path = recipe.teacher.path
    return Path(path).name if _is_local(path) else path


def _is_linear(recipe: Recipe) -> bool:
    """Whether the student is linear attention, where it is not the teacher's own softmax attention."""
    return mixer_class(recipe.student.variant).RECURRENT


def _is_local(path: str) -> bool:
    return is_gguf(path) or path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).is_dir()


def _metadata(recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["radlads", *(["linear-attention"] if _is_linear(recipe) else []), recipe.student.variant],
    }
    if recipe.publish.license:
        values["license"] = recipe.publish.license
    if recipe.teacher is not None and not _is_local(recipe.teacher.path) and recipe.teacher.path != "demo":
        values["base_model"] = recipe.teacher.path
    return values


def _introduction(products: Products, recipe: Recipe) -> str:
    if recipe.teacher is None:
        return "A small causal language model, trained from random weights to be a teacher for conversions."
    kept = len(products.attention_layers(recipe))
    layers = products.plan.num_layers if products.plan is not None else None
    linear = products.plan.linear_layers if products.plan is not None else 0
    if not kept and not linear:
        share = "every layer"
    else:
        share = f"{layers - kept - linear} of its {layers} layers" if layers else "most layers"
    own = "a recurrent mixer with constant memory"
    if not _is_linear(recipe):
        own = "attention to the first and the last tokens alone, with constant memory,"
    shape = f"In {share}, {own} replaces softmax attention"
    if linear:
        shape += f"; {linear} layers were linear attention before, and stayed as they were"
    return (
        f"{teacher_name(recipe)}, converted {'to linear attention ' if _is_linear(recipe) else ''}by the RADLADS "
        f"method (arXiv 2505.03005). {shape} "
        f"(`{recipe.student.variant}`)."
    )


def _making(products: Products, recipe: Recipe) -> list[Block]:
    teacher = products.plan.teacher if products.plan is not None else None
    blocks: list[Block] = []
    if teacher is not None:
        named = f"`{teacher.fingerprint}`, its tokenizer `{teacher.tokenizer_fingerprint}`"
        blocks.append(Text(f"- **teacher**: {teacher_name(recipe)}, by content {named}"))
    if products.plan is not None and products.plan.gguf is not None:
        blocks.append(Text(f"- **the teacher's file**: {products.plan.gguf}"))
    for stage in MODEL_STAGES:
        summary = choice_summary(products) if stage == CHOOSE.name else None
        if summary is not None:
            blocks.append(Text(f"- **{stage}**: {summary}"))
        section, product = getattr(recipe, stage, None), products.of_stage(stage)
        if section is None or product is None:
            continue
        contexts, batches = (_each(getattr(part, name) for part in section.parts) for name in ("context", "batch"))
        phases = f" in {len(section.parts)} phases" if len(section.parts) > 1 else ""
        mixed = f", {percent(section.mixed.share)} of the rows from `{section.mixed.data}`" if section.mixed else ""
        blocks.append(
            Text(
                f"- **{stage}**: {stage_info(stage).does}; {count(section.seen_tokens)} tokens{phases}, "
                f"context {contexts}, batch {batches}, {count(section.num_steps)} steps, "
                f"dataset `{section.data}`{mixed} ({product.short})"
            )
        )
    if not any(product for stage in TRAINING_STAGES if (product := products.of_stage(stage))):
        blocks.append(Text("The weights are copied from the teacher; no training."))
    return blocks


def _each(values: Iterable[int]) -> str:
    """The distinct numbers in order."""
    return ", ".join(map(str, dict.fromkeys(values)))


def _limits(products: Products, recipe: Recipe) -> list[Block]:
    """Known limits of this model."""
    limits = []
    if recipe.teacher is not None and not products.attention_layers(recipe):
        limits.append(
            "It has no softmax attention: its memory is a state of fixed size, so it cannot retrieve arbitrary details "
            "of a long text. Such models lose most retrieval beyond their training length."
            if _is_linear(recipe)
            else "No layer sees all of a text: it cannot retrieve details that are neither in its window nor among the "
            "first tokens."
        )
    contexts = [section.longest_context for stage in TRAINING_STAGES if (section := getattr(recipe, stage)) is not None]
    if contexts:
        limits.append(f"The longest training context is {max(contexts)} tokens.")
    if products.evaluation is None or not products.evaluation["tasks"]:
        limits.append("It was not evaluated on benchmark tasks.")
    limits.append(
        "The numbers are from one run with one seed; differences within the given errors are not significant."
    )
    limits.append(
        "It inherits the knowledge, the biases and the licence terms of its teacher and of its training text."
    )
    return [Text(f"- {limit}") for limit in limits]
