"""The units of work of one process: everything in it, by the product's own functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ROWS, Record, Row, Settings, Unit
from safetensors.torch import load_file, save_file

from radlads.model.convert.layer_choice import difficulty_scores, even_layers, last_layers, spaced_layers
from radlads.model.convert.layer_scores import TokenCount, sum_layers
from radlads.model.convert.layer_search import Layers, LayerScore, search_layers
from radlads.model.convert.restore import restore_attention
from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import load_teacher
from radlads.model.training.calibration import alignment_loss, calibrate
from radlads.model.training.objectives import build_objective
from radlads.tasks.contracts.recipe.recipe import Recipe, Training
from radlads.tasks.contracts.recipe.teacher import Calibration
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec
from radlads.tasks.jobs.choose.choice_probe import make_quizzes, quiz_batches, text_batches
from radlads.tasks.jobs.data.batch_plan import plan_batches
from radlads.tasks.jobs.data.encode import Encoder
from radlads.tasks.jobs.data.encoded_documents import Spool
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.data.reader import Reader
from radlads.tasks.jobs.data.shards import Layout, write_dataset
from radlads.tasks.jobs.judge.generation import generate
from radlads.tasks.jobs.judge.heldout_scores import open_windows, score_windows, summarize
from radlads.tasks.jobs.judge.judged_models import as_judged
from radlads.tasks.jobs.judge.needle import is_hit, make_trials
from radlads.tasks.jobs.process_group import join_group
from radlads.tasks.jobs.sources import load_tokenizer, resolve_teacher_path, tokenizer_fingerprint
from radlads.tasks.jobs.train.calibrate import heldout_batches, training_batches
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.steps import optimizer_steps
from radlads.tasks.jobs.train.training_models import checkpoint_activations

TEACHER = TeacherRef(path="demo", fingerprint="demo")
CHECK_STEP = 100
SHARE = 0.25


class Bench:
    """Teacher and data of one process, and the units that it can run."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.recipe = settings, settings.recipe
        self.device = torch.device("cuda", 0) if settings.device == "cuda" else torch.device("cpu")
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        join_group(self.device, 0, 1)
        path = resolve_teacher_path(TEACHER.path)
        self.teacher = as_judged(load_teacher(path, dtype=self.dtype, device=self.device))
        self.tokenizer = load_tokenizer(TEACHER.path)

    def open_data(self) -> None:
        """Called when the datasets exist."""
        recipe, work = self.recipe, self.settings.work
        self.data = open_dataset(work / recipe.align.data)
        judging = recipe.evaluate
        self.windows = open_windows(work / judging.data, judging.context, judging.heldout_tokens)
        self.trials = make_trials(recipe.needle, self.tokenizer)
        self.unseen = heldout_batches(self.data.split("heldout"), 16, recipe.align.context)

    def run(self, unit: Unit) -> Record:
        """Run a unit and return its results. Raises all of its errors."""
        began = time.monotonic()
        found: Record = getattr(self, unit.kind)(*([ROWS[unit.row], unit] if unit.row else []))
        return found | {"seconds": round(time.monotonic() - began, 2)}

    # Units

    def teacher_needle(self) -> Record:
        return self.needle(self.teacher)

    def pure(self, row: Row, unit: Unit) -> Record:
        student, record, curves = self.align(row, unit.seed)
        save_file(_own_tensors(student), self._aligned_file(row, unit.seed))
        record["kl_align"] = self.judge(student)["kl"]
        began = time.monotonic()
        chosen, cost = self.choose(student, curves)
        record |= {"choices": chosen, "choice_tokens": cost, "choice_seconds": round(time.monotonic() - began, 2)}
        return record | self.distill(student, unit.seed)

    def calibrated(self, row: Row, unit: Unit) -> Record:
        return self.align(row, unit.seed, Calibration())[1]

    def hybrid(self, row: Row, unit: Unit) -> Record:
        path = self._aligned_file(row, unit.seed)
        if path.is_file():
            student = self._filled(row, load_file(path, device=str(self.device)))
        else:
            student = self.align(row, unit.seed)[0]
        restore_attention(student, self.teacher, unit.layers, attention_rope=self.recipe.student.attention_rope)
        return self.distill(student, unit.seed)

    def control(self, row: Row, unit: Unit) -> Record:
        return self.hybrid(row, unit)

    def speed(self, row: Row, unit: Unit) -> Record:
        """Tokens/s of a whole step, loading and optimizer included."""
        found: Record = {}
        for stage in ("align", "distill"):
            section = getattr(self.recipe, stage)
            for name, (batch, context) in {"": (section.batch, section.context), "_large": self.settings.large}.items():
                warm, timed = 3, self.settings.speed_steps
                sizes = {"batch": batch, "micro_batch": batch, "context": context}
                asked = section.model_copy(update=sizes | {"tokens": batch * context * (warm + timed)})
                times: list[float] = []
                watch = lambda s, t=times, w=warm: t.append(self._now()) if s == w else 0  # noqa: E731
                self.train(stage, self.student(row, 0), asked, watch=watch)
                found[stage + name] = batch * context * timed / (self._now() - times[0])
        return found

    # Their parts

    def student(self, row: Row, seed: int) -> RadladsForCausalLM:
        torch.manual_seed(1337 + seed)
        rope = self.recipe.student.attention_rope
        given = {"variant": row.variant, "options": row.options, "attention_layers": (), "attention_rope": rope}
        student = build_student(self.teacher.config, dtype=self.dtype, **given).to(self.device)
        transplant(self.teacher, student)
        return student.eval()

    def fresh(self, student: RadladsForCausalLM, row: Row) -> RadladsForCausalLM:
        """A copy of a trained student that no engine uses."""
        return self._filled(row, _own_tensors(student))

    def _filled(self, row: Row, tensors: dict[str, torch.Tensor]) -> RadladsForCausalLM:
        student = self.student(row, 0)
        own = _own_tensors(student)
        assert own.keys() == tensors.keys(), "the aligned student is of another form"
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return student

    def align(
        self, row: Row, seed: int, calibration: Calibration | None = None
    ) -> tuple[RadladsForCausalLM, Record, dict[int, list[float]]]:
        section, student = self._seeded("align", seed), self.student(row, seed)
        record: Record = {}
        if calibration is not None:
            batches = training_batches(self.data.split("train"), calibration, section.context)
            calibrate(student, self.teacher, batches, parts=calibration.parts)

        def watch(step: int) -> None:
            if step in (0, CHECK_STEP, section.num_steps):
                record[f"align_{step}"] = alignment_loss(student.eval(), self.teacher, self.unseen)

        began = time.monotonic()
        curves = self.train("align", student, section, watch=watch)
        watch(section.num_steps)
        record["align_final"] = record.pop(f"align_{section.num_steps}")
        record["align_seconds"] = round(time.monotonic() - began, 2)
        layers = {int(name[6:]): values for name, values in curves.items() if name.startswith("layer_")}
        return self.fresh(student, row), record, layers

    def distill(self, student: RadladsForCausalLM, seed: int) -> Record:
        began = time.monotonic()
        self.train("distill", student, self._seeded("distill", seed))
        seconds = round(time.monotonic() - began, 2)
        return {"distill_seconds": seconds} | self.judge(student) | self.needle(student)

    def train(
        self,
        stage: str,
        student: RadladsForCausalLM,
        section: Training,
        watch: Callable[[int], Any] = lambda step: None,
    ) -> dict[str, list[float]]:
        """A stage's optimizer steps by the product's engine; metric → its value at every step. Raises NonFiniteError.

        watch is called before every step, with the number of completed steps. The engine owns the student
        afterwards: `fresh` makes a copy that can be trained further.
        """
        student.requires_grad_(True)
        checkpoint_activations(student, section)
        objective = build_objective(TrainSpec(objective=stage, section=section, teacher=TEACHER), student, self.teacher)
        plans = plan_batches(section, self.data.split("train"), 1)
        engine = Engine(
            objective,
            section,
            device=self.device,
            dtype=self.dtype,
            zero_stage=0,
            micro_batch=plans[0].sequences,
            num_micro=plans[0].num_micro,
        )
        found: dict[str, list[float]] = {}
        watch(0)
        for step in optimizer_steps(section, engine, plans):
            for name, value in step.seen.metrics.items():
                found.setdefault(name, []).append(value)
            if step.number < section.num_steps:
                watch(step.number)
        return found

    def choose(
        self, student: RadladsForCausalLM, curves: dict[int, list[float]]
    ) -> tuple[dict[str, tuple[int, ...]], int]:
        """Way → layers, and the tokens that recall read; the other ways read none."""
        num_layers, probe, used = len(student.mixers()), self.settings.probe, TokenCount()
        count = max(1, round(SHARE * num_layers))
        quizzes = quiz_batches(make_quizzes(probe, self.tokenizer), probe.micro_batch, bos_id=None)
        batches = [*quizzes, *text_batches(self.data.split("heldout"), probe)]

        def score(sets: Sequence[Layers]) -> dict[Layers, LayerScore]:
            sums = sum_layers(student, self.teacher, batches, sets, count=used)
            return {layers: total.score() for layers, total in sums.items()}

        chosen = {
            "even": even_layers(count, num_layers),
            "last": last_layers(count, num_layers),
            "difficulty": spaced_layers(difficulty_scores(curves), count, num_layers=num_layers),
            "recall": search_layers(score, count, range(num_layers))[0],
        }
        return chosen, used.student + used.teacher

    def judge(self, student: RadladsForCausalLM) -> Record:
        as_judged(student)
        scores = score_windows(self.teacher, student, self.windows, batch=16, mine=range(len(self.windows)))
        ordered = [scores[number] for number in range(len(self.windows))]
        found = summarize(np.array(ordered), self.windows.num_bytes, self.windows.context)
        ours = found["student"]
        kept = {key: ours[key]["value"] for key in ("kl", "bits_per_byte", "bits_per_byte_ratio", "top1_agreement")}
        return kept | {
            "kl_stderr": ours["kl"]["stderr"],
            "teacher_bits_per_byte": found["teacher"]["bits_per_byte"]["value"],
        }

    def needle(self, model: Any) -> Record:
        as_judged(model)
        by_length: dict[str, float] = {}
        for length in sorted({trial.length for trial in self.trials}):
            asked = [trial.case for trial in self.trials if trial.length == length]
            prompts = [case.prompt_ids for case in asked]
            texts = generate(model, self.tokenizer, prompts, self.recipe.needle.max_new_tokens)
            hits = [text is not None and is_hit(text, case.answer) for text, case in zip(texts, asked, strict=True)]
            by_length[str(length)] = sum(hits) / len(hits)
        return {"needle": sum(by_length.values()) / len(by_length), "needle_by_length": by_length}

    def _seeded(self, stage: str, seed: int) -> Training:
        section: Training = getattr(self.recipe, stage)
        return section.model_copy(update={"seed": section.seed + seed})

    def _aligned_file(self, row: Row, seed: int) -> Path:
        section, dtype = self.recipe.align, str(self.dtype).removeprefix("torch.")
        name = f"{row.name.replace(' ', '-')}-{seed}-{section.batch}-{section.context}-{section.num_steps}-{dtype}"
        return self.settings.work / f"aligned-{name}.safetensors"

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _own_tensors(student: RadladsForCausalLM) -> dict[str, torch.Tensor]:
    return {k: v for k, v in student.state_dict().items() if k not in student.all_tied_weights_keys}


def make_data(recipe: Recipe, work: Path) -> None:
    """The datasets that training and judging read, each once."""
    tokenizer = load_tokenizer(TEACHER.path)
    for name in {recipe.align.data, recipe.distill.data, recipe.evaluate.data}:
        dataset, folder = recipe.data[name], work / name
        if (folder / "index.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(
            tokenizer, dataset.add_bos, dataset.heldout_fraction, with_mask=False, sources=dataset.sources
        )
        spool = Spool(work / f"{name}-encoded")
        for batch in Reader(dataset.sources, tokenizer).batches(4 << 20, spool.state):
            spool.append(encoder.encode(*batch))
        layout = Layout(
            shard_tokens=dataset.shard_tokens,
            max_tokens=dataset.max_tokens,
            seed=dataset.seed,
            eos_id=tokenizer.eos_token_id,
            bos_id=tokenizer.bos_token_id,
            add_bos=dataset.add_bos,
            vocab_size=len(tokenizer),
            tokenizer_fingerprint=tokenizer_fingerprint(TEACHER.path),
            with_mask=False,
        )
        write_dataset(spool.read(), folder, layout)
