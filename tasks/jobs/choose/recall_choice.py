"""Choosing layers by recall: forward passes of the student with sets of layers restored, split over the ranks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.model.convert.layer_scores import ProbeBatch, Sums, TokenCount, sum_layers, teacher_recall
from radlads.model.convert.layer_search import Layers, LayerScore, Round, search_layers
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import AttentionChoice, NeedleProbe
from radlads.tasks.jobs.choose.choice_probe import make_probe, own_share, text_batches
from radlads.tasks.jobs.common import Job, NonFiniteError
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.process_group import gather

logger = logging.getLogger("radlads")


def choose_by_recall(
    job: Job,
    student: RadladsForCausalLM,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choice: AttentionChoice,
    run_tokens: int,
) -> dict[str, Any]:
    """The layers, and what choose.json says of how they were found. Collective: each rank scores its share, and all get
    the same result. Raises UserError, before a layer is tried, where the teacher fails a probe that it must pass."""
    folder, section = job.input("data"), choice.recall
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    quizzes = make_probe(choice, tokenizer, add_bos=bool(index.get("add_bos")))
    texts = list(text_batches(open_dataset(folder).split("heldout"), section))
    mine = [batch for kind in (quizzes, texts) for batch in own_share(kind, job.rank, job.world_size)]
    used, layers = TokenCount(), sorted(student.mixers())
    theirs = sum(gather(teacher_recall(teacher, mine, count=used), job.world_size), Sums()).score()
    logger.info("the teacher answers %.1f %% of the probe, recall %.3f nats", 100 * theirs.accuracy, theirs.recall)
    if choice.probe is not None:
        _check_teacher(theirs, choice.probe)
    scores = _Scores(job, student, teacher, mine, used, total=len(mine) * choice.passes(len(layers)))
    chosen, rounds = search_layers(
        scores, choice.count, layers, search=choice.search, candidates=choice.candidate_layers
    )
    after = scores([chosen])[chosen]
    tokens = sum(gather(used.student + used.teacher, job.world_size))
    if tokens > section.budget * run_tokens:
        raise UserError(
            f"the choice used {tokens} tokens, more than {section.budget:.0%} of the run's {run_tokens}; lower "
            "recall.documents or recall.heldout_tokens"
        )
    begun = scores.known[()]
    return {
        "attention_layers": list(chosen),
        "search": choice.search,
        "candidates": choice.candidate_layers,
        "layers": _table(rounds, chosen),
        "rounds": [_round(number, result) for number, result in enumerate(rounds, start=1)],
        "teacher": {"recall": theirs.recall, "accuracy": theirs.accuracy},
        "probe": {
            "needles": None if choice.probe is None else choice.probe.model_dump(mode="json"),
            "documents": section.documents,
            "answers": begun.answers,
            "text_tokens": begun.text_tokens,
        },
        "numbers": {
            "tokens": tokens,
            "token_share": tokens / run_tokens,
            "recall_teacher": theirs.recall,
            "accuracy_teacher": theirs.accuracy,
            **{f"{key}_before": value for key, value in vars(begun.score()).items()},
            **{f"{key}_after": value for key, value in vars(after).items()},
        },
    }


class _Scores:
    """The student's scores by the layers restored, over all ranks; each set is measured once."""

    def __init__(
        self,
        job: Job,
        student: RadladsForCausalLM,
        teacher: PreTrainedModel,
        mine: Sequence[ProbeBatch],
        used: TokenCount,
        *,
        total: int,
    ) -> None:
        """mine: this rank's batches. used: receives numbers of tokens. total: passes expected at most."""
        self.known: dict[Layers, Sums] = {}
        self._job, self._student, self._teacher, self._mine, self._used = job, student, teacher, mine, used
        self._done, self._total = 0, total

    def __call__(self, sets: Sequence[Layers]) -> dict[Layers, LayerScore]:
        new = [layers for layers in sets if layers not in self.known]
        if new:
            own = sum_layers(self._student, self._teacher, self._mine, new, count=self._used, progress=self._count_pass)
            parts = gather(own, self._job.world_size)
            self.known |= {layers: sum((part[layers] for part in parts), Sums()) for layers in new}
        found = {layers: self.known[layers].score() for layers in sets}
        first = found[sets[0]]
        if not all(map(math.isfinite, vars(first).values())):
            raise NonFiniteError(
                "the recall or KL of the aligned student is not finite, so its layers cannot be compared"
            )
        logger.info("with %s: recall %.3f nats, KL %.4f", list(sets[0]) or "no layer", first.recall, first.kl)
        return found

    def _count_pass(self) -> None:
        self._done += 1
        self._job.progress(self._done, self._total, "passes")


def _check_teacher(theirs: LayerScore, probe: NeedleProbe) -> None:
    """Raises UserError if the teacher does not pass the probe."""
    if theirs.accuracy < probe.least:
        form = "set probe.chat: false" if probe.chat else "set probe.chat: true where it is a chat model"
        raise UserError(
            f"the teacher answers {theirs.accuracy:.1%} of the probe's needles, less than the {probe.least:.0%} of "
            "attention_layers.probe.least, so the probe would say little about recall; shorten recall.lengths, "
            f"{form}, or list other probe.tasks (niah_single_1 is the easiest)"
        )


def _table(rounds: list[Round], chosen: Layers) -> list[dict[str, Any]]:
    """One row per layer: its scores in the first round, and the round in which it was chosen."""
    first = rounds[0]
    taken = {layer: number for number, result in enumerate(rounds, start=1) for layer in result.chosen}
    return [
        {
            "layer": layer,
            "score": _finite(first.values[layer,]),
            "recall_gained": _finite(score.recall - first.before.recall),
            "accuracy": _finite(score.accuracy),
            "kl_saved": _finite(first.before.kl - score.kl),
            "kl": _finite(score.kl),
            "chosen": layer in chosen,
            "round": taken.get(layer),
        }
        for (layer,), score in sorted(first.scores.items())
    ]


def _round(number: int, result: Round) -> dict[str, Any]:
    """candidates: the layers restored in addition to `kept`, joined by +, and their scores."""
    scores = {
        "+".join(map(str, layers)): {key: _finite(value) for key, value in vars(score).items()}
        | {"score": _finite(result.values[layers])}
        for layers, score in sorted(result.scores.items())
    }
    return {
        "round": number,
        "kept": list(result.kept),
        "before": vars(result.before),
        "candidates": scores,
        "chosen": list(result.chosen),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
