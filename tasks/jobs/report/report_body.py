"""Builds the report of a run as blocks. Every number has the digest of the product that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from radlads.tasks.contracts.recipe.recipe import dump_recipe
from radlads.tasks.contracts.recipe.sections import Recipe, Student
from radlads.tasks.contracts.stages import EVALUATE, NEEDLE, TRAINING_STAGES, TRANSPLANT
from radlads.tasks.jobs.report.choice_report import choice_blocks
from radlads.tasks.jobs.report.judged.reason import reason_table
from radlads.tasks.jobs.report.judged.speed_report import speed_blocks
from radlads.tasks.jobs.report.judged.suite_report import suite_row, suite_table
from radlads.tasks.jobs.report.judged.writing_report import writing_blocks, writing_rows
from radlads.tasks.jobs.report.number_format import (
    count,
    dollars,
    duration,
    gibibytes,
    measured,
    percent,
    plain,
    prompt_note,
    rate_of,
    times,
)
from radlads.tasks.jobs.report.origin_blocks import origin_blocks
from radlads.tasks.jobs.report.products import Products, ReportedProduct
from radlads.tasks.jobs.report.report_blocks import Block, Code, Heading, Picture, Table, Text, Verdict
from radlads.tasks.jobs.report.retrieval.blocks import retrieval_blocks, ruler_rows
from radlads.tasks.jobs.report.watch_report import watch_blocks

_SOURCE = "source"


def build_report(
    products: Products, recipe: Recipe, verdicts: Sequence[Verdict], pictures: Sequence[str]
) -> list[Block]:
    """The whole report. pictures: file names of the available pictures."""
    blocks: list[Block] = []
    if recipe.description:
        blocks.append(Text(recipe.description))
    reason = reason_table(products, recipe)
    blocks += [*([] if reason is None else [reason]), *verdicts]
    blocks += [*_summary(products), *_stages(products), *retrieval_blocks(products, pictures)]
    blocks += [*_tasks(products), *writing_blocks(products), *speed_blocks(products, pictures)]
    blocks += [*_curves(products, pictures), *watch_blocks(products)]
    blocks += [*_samples(products), *_student(products, recipe)]
    blocks += choice_blocks(products, list(pictures))
    blocks += [*_cost(products, recipe), *origin_blocks(products), *_recipe(recipe)]
    return blocks


def summary_table(products: Products) -> Table | None:
    """Teacher and student side by side; None without evaluate and needle."""
    rows: list[tuple[str, str, str, str, str]] = []
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    if evaluation is not None and judged is not None:
        teacher, student = evaluation["models"]["teacher"], evaluation["models"]["student"]
        ratio = student["bits_per_byte_ratio"]
        rows += [
            ("bits per byte", *_pair(teacher, student, "bits_per_byte"), f"× {measured(ratio)}", judged.short),
            (
                "loss, nats per token",
                *_pair(teacher, student, "loss"),
                f"{student['loss_gap']['value']:+.4f}",
                judged.short,
            ),
            ("KL(teacher‖student), nats per token", "0", measured(student["kl"]), "", judged.short),
            ("same most likely token", "100 %", percent(student["top1_agreement"]["value"]), "", judged.short),
            *_text_rows(evaluation, judged.short),
            *suite_row(evaluation, judged.short),
            *writing_rows(evaluation, judged.short),
        ]
    needle, searched = products.needle, products.of_stage(NEEDLE.name)
    if needle is not None and searched is not None:
        models = needle["models"]
        for label, pick in (("needles found", lambda m: m), ("… at the training length", _trained)):
            theirs, ours = pick(models["teacher"]), pick(models["student"])
            rows.append((label, rate_of(theirs), rate_of(ours), times(theirs, ours), searched.short))
        rows += ruler_rows(needle.get("ruler"), searched.short)
    if not rows:
        return None
    return Table(
        ("", "teacher", "student", "student / teacher", _SOURCE),
        rows,
        "± is one standard error. Source: digest of the product that contains the number.",
        words=(_SOURCE,),
    )


def _text_rows(evaluation: dict[str, Any], source: str) -> list[tuple[str, str, str, str, str]]:
    """Bits per byte of every text of `evaluate.texts`."""
    return [
        (
            f"{name}: bits per byte (contexts of {count(found['context'])})",
            *_pair(found["teacher"], found["student"], "bits_per_byte"),
            f"× {measured(found['student']['bits_per_byte_ratio'])}",
            source,
        )
        for name, found in evaluation.get("texts", {}).items()
    ]


def _trained(numbers: dict[str, Any]) -> dict[str, Any] | None:
    cell: dict[str, Any] | None = numbers["at_training_length"]
    return cell


def _pair(teacher: dict[str, Any], student: dict[str, Any], key: str) -> tuple[str, str]:
    return measured(teacher[key]), measured(student[key])


def _summary(products: Products) -> list[Block]:
    table = summary_table(products)
    if table is None:
        return []
    blocks: list[Block] = [Heading("Teacher and student"), table]
    evaluation = products.evaluation
    if evaluation is not None:
        blocks.append(
            Text(
                f"Text numbers: {count(evaluation['tokens'])} held-out tokens ({count(evaluation['bytes'])} bytes) in "
                f"{evaluation['windows']} windows of {evaluation['context']}, teacher and student in one run, "
                f"{evaluation['dtype']}."
            )
        )
    return blocks


def stages_table(products: Products) -> Table | None:
    """KL of every stage's model on the same windows; None where only one was scored."""
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    if evaluation is None or judged is None:
        return None
    final = products.final.manifest.stage
    rows = []
    names = [name for name in evaluation["models"] if name not in ("teacher", "student", final)]
    for name in [*names, "student"]:
        numbers = evaluation["models"][name]
        rows.append(
            (
                f"{final} (the student)" if name == "student" else name,
                measured(numbers["kl"]),
                percent(numbers["top1_agreement"]["value"]),
                measured(numbers["bits_per_byte"]),
                f"× {plain(numbers['bits_per_byte_ratio']['value'])}",
                judged.short,
            )
        )
    header = ("after", "KL to the teacher", "same top token", "bits per byte", "of the teacher's", _SOURCE)
    return Table(header, rows, "Every model on the same held-out windows.", words=(_SOURCE,))


def _stages(products: Products) -> list[Block]:
    table = stages_table(products)
    return [] if table is None else [Heading("Stage by stage"), table]


def tasks_table(products: Products) -> Table | None:
    """lm-evaluation-harness tasks but those of the suite; None without any."""
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    tasks = {} if evaluation is None else {k: v for k, v in evaluation["tasks"].items() if "suite" not in v}
    if judged is None or not tasks:
        return None
    rows = []
    for name, task in tasks.items():
        shots = "default" if task["num_fewshot"] is None else str(task["num_fewshot"])
        limit = "all" if task["limit"] is None else str(task["limit"])
        rows += [
            (f"{name}, {metric}", measured(theirs), measured(task["student"].get(metric)), shots, limit, judged.short)
            for metric, theirs in task["teacher"].items()
        ]
    header = ("task", "teacher", "student", "few-shot", "examples", _SOURCE)
    return Table(header, rows, prompt_note(next(iter(tasks.values()))), words=(_SOURCE,))


def _tasks(products: Products) -> list[Block]:
    tables = [table for table in (suite_table(products), tasks_table(products)) if table is not None]
    return [Heading("Benchmark tasks"), *tables] if tables else []


def _curves(products: Products, pictures: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    if "losses.png" in pictures:
        sources = [p.short for stage in TRAINING_STAGES if (p := products.of_stage(stage)) is not None]
        caption = f"Training loss per step (faint), its running mean, held-out losses. Sources: {', '.join(sources)}."
        blocks.append(Picture("losses.png", "Loss curves of the training stages", caption))
    if "layers.png" in pictures:
        caption = "Align, layer by layer: layers that stay high are candidates for `student.attention_layers`."
        blocks.append(Picture("layers.png", "Align loss of every layer over the steps", caption))
    return [Heading("Loss curves"), *blocks] if blocks else []


def _samples(products: Products) -> list[Block]:
    if products.evaluation is None or not products.evaluation.get("samples"):
        return []
    blocks: list[Block] = [Heading("Samples"), Text("Greedy continuations of the beginnings of held-out windows.")]
    for sample in products.evaluation["samples"]:
        text = f"prompt   {sample['prompt']!r}\nteacher  {sample['teacher']!r}\nstudent  {sample['student']!r}"
        blocks.append(Code(text))
    return blocks


def _student(products: Products, recipe: Recipe) -> list[Block]:
    sheet, product = products.sheet(TRANSPLANT.name, "transplant.json"), products.of_stage(TRANSPLANT.name)
    if sheet is None or product is None:
        return []
    kept = ", ".join(map(str, products.attention_layers(recipe))) or "none"
    rows: list[tuple[str, ...]] = [
        (place, count(numbers["copied"]), count(numbers["fresh"]), count(numbers["dropped"]))
        for place, numbers in sheet["layers"].items()
    ]
    rows.append(("all", *(count(sheet["parameters"][kind]) for kind in ("copied", "fresh", "dropped"))))
    text = (
        f"Variant `{recipe.student.variant}`; layers that stay softmax attention: {kept}"
        f"{'' if kept == 'none' else _of_kept_layers(recipe.student)}. "
        f"Source: {product.short}."
    )
    caption = "Parameters copied from the teacher, newly initialised and dropped in transplant."
    if products.choice is not None:
        caption += " In the layers chosen after align, the teacher's attention then replaced the new parameters."
    table = Table(("parameters", "copied", "fresh", "dropped"), rows, caption)
    return [Heading("The student"), Text(text), table]


def _of_kept_layers(student: Student) -> str:
    """How softmax attention that is kept differs from the teacher's."""
    base = student.attention_log_scale
    scaled = None if base is None else f"scores at position t times the logarithm of t + {base} to the base {base}"
    told = [text for text in (None if student.attention_rope else "without rotary positions", scaled) if text]
    return f" ({'; '.join(told)})" if told else ""


def _cost(products: Products, recipe: Recipe) -> list[Block]:
    plan = products.plan
    rows = []
    for product in products.stages:
        stage, metrics = product.manifest.stage, product.manifest.metrics
        planned = plan.stages.get(stage, {}) if plan is not None else {}
        if not planned and stage not in TRAINING_STAGES:
            continue
        hours = gpu_hours(product, planned)
        price = recipe.resources.dollars_per_gpu_hour
        rows.append(
            (
                stage,
                count(planned.get("steps")),
                count(metrics.get("tokens") or planned.get("tokens")),
                f"{duration(planned.get('seconds'))} / {duration(metrics.get('seconds'))}",
                f"{gibibytes(planned.get('memory_bytes_per_gpu', {}).get('total'))} / "
                f"{gibibytes(metrics.get('memory_bytes'))}",
                f"{plain(planned.get('gpu_hours'), 2)} / {plain(hours, 2)}",
                f"{dollars(planned.get('dollars'))} / {dollars(hours * price if hours and price else None)}",
                product.short,
            )
        )
    if not rows:
        return []
    header = ("stage", "steps", "tokens", "time", "memory", "GPU hours", "cost", _SOURCE)
    caption = "Planned / actual. Planned with start-up, checkpoints, export; actual times of training: its steps alone."
    return [Heading("Planned and actual cost"), Table(header, rows, caption, words=(_SOURCE,))]


def gpu_hours(product: ReportedProduct, planned: dict[str, Any]) -> float | None:
    """What a stage took, in GPU hours; None on a CPU."""
    metrics = product.manifest.metrics
    if metrics.get("gpu_hours"):
        return float(metrics["gpu_hours"])
    if planned.get("gpu_hours") is None or "seconds" not in metrics:
        return None
    return float(metrics["seconds"]) * float(metrics.get("processes", 1)) / 3600


def _recipe(recipe: Recipe) -> list[Block]:
    blocks: list[Block] = [Heading("Recipe")]
    blocks += [Text(source) for source in recipe.sources]
    blocks.append(Code(dump_recipe(recipe), "yaml", folded="The resolved recipe (recipe.yaml)"))
    return blocks
