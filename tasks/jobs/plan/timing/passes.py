"""Seconds of what is not training: forward passes and generation, in held-out passes, choose, evaluate and needle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import expand_paths, resolve_file
from radlads.tasks.contracts.recipe.choice import late_choice
from radlads.tasks.contracts.recipe.judging.texts import EvalText
from radlads.tasks.contracts.recipe.sections import Evaluate, Needle, Recipe, SampleSource
from radlads.tasks.contracts.stages import logits_reference
from radlads.tasks.jobs.data.ruler.tasks import TASKS
from radlads.tasks.jobs.data.text.text_files import EXPANSION
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.speed import REPEATS
from radlads.tasks.jobs.plan.memory import NetworkSizes
from radlads.tasks.jobs.plan.timing.harness import task_sizes
from radlads.tasks.jobs.plan.timing.measured import CPU
from radlads.tasks.jobs.plan.timing.speed import ASSUMED, UNKNOWN_PEAK
from radlads.tasks.jobs.plan.timing.step_time import CORE_FLOPS
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS

_SHARE = 0.40  # assumed: of the peak, in forward passes through transformers' modules
_WIDE = 1440  # model width below which it falls: 0.16 at 576, as in training (benchmarks/results/training_h100.md)
# Of the host, for a layer of a pass without gradients: 1.0 of a teacher and 2.4 of a student at once 1,024 tokens of
# SmolLM2-135M (benchmarks/results/serving_h200.md), so a mean; a step of generation is such a pass, of which a student
# records its own.
_PASS_SECONDS = 1.7e-3
_DECODE_SECONDS = 1.0e-3
_REPLAY_SECONDS = 0.25e-3  # likewise where steps are replayed as CUDA graphs; assumed
_REQUEST_SECONDS = 1.0e-3  # assumed: of a request on the host, its tokens and its score, for both networks
_TEXT_BYTES = 4.0  # of a token of English
_SAMPLE_TOKENS = 48  # that evaluate generates from three prompts, of teacher and student


@dataclass(frozen=True)
class Device:
    """What computes a stage. kind: of GPU, CPU, None: unknown."""

    kind: str | None
    processes: int
    threads: int
    recorded: bool = False
    """Steps of generation are replayed as CUDA graphs."""
    width: int = _WIDE
    """Of the model."""

    def forward_seconds(self, flops: float, tokens: float, layers: int, at_once: int) -> float:
        """Of `tokens` tokens, over all processes. flops: of a token; at_once: tokens of one pass."""
        computing = self._computing_seconds(flops, tokens)
        launching = tokens / self.processes / at_once * layers * _PASS_SECONDS
        return computing if self.kind == CPU else max(computing, launching)

    def decode_seconds(self, flops: float, steps: float, layers: int, sequences: int) -> float:
        """Of `steps` generated tokens of as many sequences at once, on one process."""
        computing = self._computing_seconds(flops, steps * sequences * self.processes)
        if self.kind == CPU:
            return computing
        return max(computing, steps * layers * (_REPLAY_SECONDS if self.recorded else _DECODE_SECONDS))

    def _computing_seconds(self, flops: float, tokens: float) -> float:
        own = tokens / self.processes
        if self.kind == CPU:
            return own * flops / (self.threads * CORE_FLOPS)
        gpu = GPU_KINDS.get(self.kind or "")
        share = ASSUMED if gpu is None or not gpu.nvidia else _SHARE * min(1.0, self.width / _WIDE)
        return own * flops / (share * (UNKNOWN_PEAK if gpu is None else gpu.peak_flops))


def judging_flops(section: Evaluate | Needle, networks: NetworkSizes, recipe: Recipe) -> float:
    """FLOP of scoring teacher and students, without the lm-evaluation-harness tasks and without what they write; RULER
    is part of needle.

    evaluate scores every stage's student and, with each, the teacher, and the last one on texts; needle runs
    the teacher once, the last student and, if that is finetuned, also the distilled one.
    """
    of = networks.multiplied
    if isinstance(section, Evaluate):
        both = of.teacher_flops(section.context) + of.forward_flops(section.context)
        flops = _students(recipe) * both * section.heldout_tokens
        for text in section.texts:
            flops += (of.teacher_flops(text.context) + of.forward_flops(text.context)) * text_tokens(text)
        return flops
    students = _needle_students(recipe)
    return sum(
        prompts * (length + new_tokens) * (of.teacher_flops(length) + students * of.forward_flops(length))
        for prompts, length, new_tokens in _answered(section)
    )


def judging_seconds(
    section: Evaluate | Needle, networks: NetworkSizes, recipe: Recipe, device: Device, budget: RowBudget
) -> float:
    """Of the passes and the generation of evaluate (harness tasks included) or needle."""
    if isinstance(section, Evaluate):
        return _evaluate_seconds(section, networks, recipe, device, budget)
    alike: dict[tuple[int, int], int] = {}  # RULER's tasks with answers as long are written together
    for prompts, length, new_tokens in _answered(section):
        alike[length, new_tokens] = alike.get((length, new_tokens), 0) + prompts
    models = 1 + _needle_students(recipe)
    return (
        models
        / 2
        * sum(
            _writing_seconds(networks, device, prompts, budget, length + new_tokens, new_tokens)
            for (length, new_tokens), prompts in alike.items()
        )
    )


def _answered(section: Needle) -> Iterator[tuple[int, int, int]]:
    """(prompts, length, tokens generated) of the needle's prompts and RULER's."""
    for length in section.lengths:
        yield len(section.depths) * section.trials, length, section.max_new_tokens
    if section.ruler is not None:
        for length, task in itertools.product(section.ruler.lengths, section.ruler.judged):
            new_tokens = TASKS[task].new_tokens
            yield section.ruler.samples, length - new_tokens, new_tokens


def _evaluate_seconds(
    section: Evaluate, networks: NetworkSizes, recipe: Recipe, device: Device, budget: RowBudget
) -> float:
    of, layers, context = networks.multiplied, networks.num_layers, section.context
    both = of.teacher_flops(context) + of.forward_flops(context)
    at_once = budget.reads(context) * context
    seconds = _students(recipe) * device.forward_seconds(both, section.heldout_tokens, 2 * layers, at_once)
    for text in section.texts:
        at_once = budget.reads(text.context) * text.context
        flops = of.teacher_flops(text.context) + of.forward_flops(text.context)
        seconds += device.forward_seconds(flops, text_tokens(text), 2 * layers, at_once)
    seconds += 2 * device.decode_seconds(both / 2, _SAMPLE_TOKENS, layers, 3)
    for size in task_sizes(section):
        requests, flops = size.items * size.requests, of.teacher_flops(size.tokens) + of.forward_flops(size.tokens)
        if size.generated:
            length = size.tokens + size.generated
            seconds += _writing_seconds(networks, device, size.items, budget, length, size.generated)
        else:
            at_once = budget.reads(size.tokens) * size.tokens
            seconds += device.forward_seconds(flops, requests * size.tokens, 2 * layers, at_once)
            seconds += requests * _REQUEST_SECONDS / device.processes
    return seconds + written_seconds(section, networks, device, budget)


def text_tokens(text: EvalText) -> float:
    """Of a text, roughly: by the sizes of its files; 0 where they are not on this machine."""
    try:
        paths = [resolve_file(name) for name in expand_paths(text.paths)]
    except UserError:  # told by the plan's checks, or not asked about
        return 0.0
    return sum(path.stat().st_size * EXPANSION.get(path.suffix, 1.0) for path in paths) / _TEXT_BYTES


def written_seconds(section: Evaluate, networks: NetworkSizes, device: Device, budget: RowBudget) -> float:
    """Of what both models write, of the teacher's reading of the samples, and of the measurement of speed."""
    asked, measured, seconds = section.generation, section.speed, 0.0
    if asked is not None:
        samples, times = asked.samples, len(asked.temperatures)
        writing = _writing_seconds(networks, device, samples, budget, asked.longest, asked.new_tokens)
        flops = networks.multiplied.teacher_flops(asked.longest)
        at_once = budget.reads(asked.longest) * asked.longest
        reading = device.forward_seconds(flops, 2 * samples * asked.longest, networks.num_layers, at_once)
        seconds += times * (writing + reading)
        if asked.instructions is not None:
            given = asked.instructions
            seconds += _writing_seconds(networks, device, given.questions, budget, given.longest, given.new_tokens)
    if measured is not None:
        rows, new_tokens = RowBudget(measured.batch), measured.new_tokens
        alone = replace(device, processes=1, recorded=False)
        runs = (
            _writing_seconds(networks, alone, measured.batch, rows, n + new_tokens, new_tokens)
            for n in measured.lengths
        )
        seconds += (1 + REPEATS) * sum(runs)
    return seconds


def _writing_seconds(
    networks: NetworkSizes, device: Device, prompts: int, budget: RowBudget, length: int, new_tokens: int
) -> float:
    """Of both models writing to `prompts` prompts. length: in tokens, of prompt and answer."""
    of, layers = networks.multiplied, networks.num_layers
    at_once = min(budget.writes(length), -(-prompts // device.processes))
    batches = -(-prompts // (at_once * device.processes))  # of the process that has most
    seconds = 0.0
    for flops in (of.teacher_flops(length), of.forward_flops(length)):
        seconds += device.forward_seconds(flops, prompts * (length - new_tokens), layers, at_once * length)
        seconds += device.decode_seconds(flops, new_tokens * batches, layers, at_once)
    return seconds


def sampling_seconds(source: SampleSource, networks: NetworkSizes, device: Device) -> float:
    """Of text that the teacher writes; each process writes its part."""
    flops = networks.multiplied.teacher_flops(source.context)
    steps = source.tokens / source.batch / device.processes
    return device.decode_seconds(flops, steps, networks.num_layers, source.batch)


def _students(recipe: Recipe) -> int:
    """That evaluate judges: the transplanted one, each stage's, and the one with chosen layers."""
    return 1 + len(recipe.training_stages) + (late_choice(recipe) is not None)


def _needle_students(recipe: Recipe) -> int:
    return 1 if logits_reference(recipe.training_stages) is None else 2
