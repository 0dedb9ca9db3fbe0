"""The text of a drafted recipe: YAML with a comment where a value has a source or a choice."""

from __future__ import annotations

import json

from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.pins.places import is_gguf
from radlads.tasks.contracts.requests.draft import DraftRequest
from radlads.tasks.contracts.stages import ALIGN, DISTILL, FINETUNE
from radlads.tasks.jobs.draft.machine import Machine
from radlads.tasks.jobs.draft.protocols import Effort, is_toy, rates
from radlads.tasks.jobs.draft.stages_text import (
    Fit,
    Sizes,
    Stages,
    align_text,
    distill_text,
    finetune_text,
    sizes_of,
)
from radlads.tasks.jobs.draft.subject import Candidate
from radlads.tasks.jobs.draft.texts import SEPARATOR, source_text

_PUBLIC = "mlfoundations/dclm-baseline-1.0-parquet"
_DEMO_TEXT = "demo:stories.txt.gz"
_LONGEST_COMMAND = 1000
_SPARE = 1.1
"""Of the text that training reads, for the held-out part and the documents' ends."""


def write_recipe(request: DraftRequest, teacher: Candidate, machine: Machine, effort: Effort, fit: Fit) -> str:
    """The recipe as YAML. fit: as found for it; an empty one takes passes of the whole part of a process."""
    processes, speed = machine.resources.processes, rates(teacher.parameters, hybrid=request.hybrid)
    sizes = sizes_of(teacher, effort, processes)
    stages = Stages(request.hybrid, is_toy(teacher.parameters), effort, sizes, speed, fit, processes)
    parts = [
        _head(request, teacher, effort, speed.source),
        _teacher(teacher, fit),
        _student(request, teacher),
        _data(request, teacher, effort),
        align_text(stages),
        distill_text(stages),
        finetune_text(stages),
        _judging(teacher, sizes, effort),
        _resources(machine, fit),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _head(request: DraftRequest, teacher: Candidate, effort: Effort, rate_source: str) -> str:
    kind = "a hybrid of RWKV-7 and softmax layers" if request.hybrid else "a pure RWKV-7 student"
    stages = [ALIGN.name, DISTILL.name] + [FINETUNE.name] * bool(effort.finetune)
    lines = [
        f"# Written by `{one_line(request.command, _LONGEST_COMMAND)}`.",
        "# `radlads plan FILE` checks it and says what it costs, `radlads run FILE` runs it. Every key: docs/keys.md.",
        f"name: {request.name}",
        "description: >",
        f"  {_quoted(teacher.path)} becomes {kind}, in the stages {', '.join(stages)}.",
        "sources:",
        f"  - {_string(f'Tokens ({effort.name}): {effort.words}')}",
        f"  - {_string(f'Rates: {rate_source}')}",
        '  - "Mixer: RAD-RWKV7 in its balanced form, betas .9/.95, eps 1e-8, clip 1 (RADLADS, arXiv 2505.03005); the',
        "    start of the first layer's share is ours.\"",
    ]
    if request.hybrid:
        chosen = "the last ones (ours)" if is_toy(teacher.parameters) else "chosen by recall"
        kept = f"A quarter of the layers kept, without positions (HALO, arXiv 2601.22156): {chosen}."
        lines.append(f"  - {_string(kept)}")
    return "\n".join(lines)


def _teacher(teacher: Candidate, fit: Fit) -> str:
    lines = ["teacher:", f"  path: {_string(teacher.path)}"]
    if not (is_gguf(teacher.path) or "/" not in teacher.path or teacher.path.startswith(("/", ".", "~"))):
        lines.append("  # revision: main      # the plan pins the commit that it finds")
    if fit.teacher_bits == 8:
        lines.append("  bits: 8               # while training: it does not fit otherwise; judging uses the original")
    return "\n".join(lines)


def _student(request: DraftRequest, teacher: Candidate) -> str:
    lines = [
        "student:",
        "  variant: rad_rwkv7",
        "  options: {form: balanced, rope: true, value_residual_init: -4.0}",
    ]
    if not request.hybrid:
        return "\n".join([*lines, "  attention_layers: []  # pure: a state of fixed size, no cache that grows"])
    count = max(1, teacher.softmax // 4)
    if is_toy(teacher.parameters):
        lines.append(f"  attention_layers: {{count: {count}, choose: last}}")
    else:
        lines += [
            "  attention_layers:",
            f"    count: {count}            # of {teacher.softmax}; fewer: less memory and faster; more: better recall",
            "    choose: recall      # by trial after align; `even` and `difficulty` need no trial",
        ]
    return "\n".join(
        [*lines, "  attention_rope: false # no positions in kept layers: reads farther than it was trained"]
    )


def _data(request: DraftRequest, teacher: Candidate, effort: Effort) -> str:
    lines = ["data:", "  text:"]
    if not is_toy(teacher.parameters):
        lines.append(f"    max_tokens: {round(_SPARE * max(effort.align, effort.distill, effort.finetune)):_}")
    lines.append("    sources:")
    if request.data:
        lines += [f"      - {source_text(place)}" for place in request.data]
    elif is_toy(teacher.parameters):
        lines.append(
            f'      - {{kind: files, paths: ["{_DEMO_TEXT}"], separator: {SEPARATOR}}}  # put your own text here'
        )
    else:
        lines.append(f"      - {{kind: hub, path: {_PUBLIC}}}   # RADLADS; the nearer to the teacher's own, the better")
        if teacher.chat:
            lines += [
                "      # The teacher can chat; a tenth of chats keeps that (docs/data.md). With a weight on both:",
                "      # - {kind: hub, path: HuggingFaceTB/smol-smoltalk, messages_field: messages, weight: 1}",
            ]
    return "\n".join(lines)


def _judging(teacher: Candidate, sizes: Sizes, effort: Effort) -> str:
    longest = sizes.longest(effort)
    first = 256 if is_toy(teacher.parameters) else min(1024, longest)
    lengths = [first]
    while lengths[-1] < min(2 * longest, teacher.context):
        lengths.append(min(2 * lengths[-1], teacher.context))
    lines = ["evaluate:", "  data: text", f"  heldout_tokens: {32768 if is_toy(teacher.parameters) else 262144}"]
    lines.append(f"  context: {sizes.distill}")
    if not is_toy(teacher.parameters):
        lines += [
            "  # RADLADS, table 5; all 0-shot. They are fetched from the hub; `suite` judges by files of your own.",
            "  tasks: [{name: lambada_openai}, {name: mmlu}, {name: arc_challenge}, {name: arc_easy},",
            "    {name: hellaswag}, {name: piqa}, {name: winogrande}]",
        ]
    lines += ["needle:                 # recall: a fact in a long text, up to twice what was trained"]
    lines.append(f"  lengths: {json.dumps(lengths)}")
    if is_toy(teacher.parameters):
        lines += [f'  haystack: ["{_DEMO_TEXT}"]', f"  haystack_separator: {SEPARATOR}"]
    return "\n".join(lines)


def _resources(machine: Machine, fit: Fit) -> str:
    resources = machine.resources
    if resources.device == "cpu":
        return "resources: {device: cpu}"
    lines = ["resources:              # the machine that this was planned for"]
    lines.append(f"  processes: {resources.processes}          # one a GPU")
    lines.append(f"  gpu_memory_gib: {resources.gpu_memory_gib:g}    # of each {machine.gpu or 'GPU'}")
    if resources.dollars_per_gpu_hour is not None:
        lines.append(f"  dollars_per_gpu_hour: {resources.dollars_per_gpu_hour:g}  # put your provider's price here")
    if fit.zero_stage == 3:
        lines.append("  zero_stage: 3         # weights divided over the GPUs: it does not fit otherwise")
    if fit.offload:
        lines.append("  offload_optimizer: true  # slower: it does not fit otherwise")
    return "\n".join(lines)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _quoted(text: str) -> str:
    return " ".join(text.split())
