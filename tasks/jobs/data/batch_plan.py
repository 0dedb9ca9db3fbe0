"""Which rows of a dataset make which batch, as a pure function of (seed, step).

Where a batch is in the data follows from its number alone, so there is nothing to save and nothing to fast-forward
after a restart, and the sequences of an optimizer step do not depend on how many processes share them. Rows of a second
dataset may be mixed in: of n sequences in their order, exactly ⌊n · share⌋ are, spread evenly.

After a rollback the rest of the order is shuffled once more: what was read before is not read again before everything
has been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.training import Training
from radlads.tasks.jobs.data.loader import Batch, DatasetError, TokenSplit
from radlads.tasks.jobs.data.permutation import permute

# A share is taken in whole parts of this many, so that the count is exact on every machine.
_PARTS = 1_000_000


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a stage, or of a phase of one: the same for any number of processes.

    The rows of an epoch come in a seeded order, every row once; the next epoch has another order.
    """

    split: TokenSplit
    context: int
    batch: int
    """Sequences of one optimizer step, over all processes."""
    micro_batch: int
    """Sequences of one forward pass of one process; made smaller where the processes would not divide the batch."""
    seed: int
    world_size: int = 1
    """Processes."""
    sharing: int = 1
    """Consecutive processes that share rows (`sequence_parallel`)."""
    document_ids: bool = False
    skip: int = 0
    """Sequences of the order that were read before step 0."""
    mixed: TokenSplit | None = None
    """Of another dataset; its rows have an order of their own."""
    share: float = 0.0
    """Of the sequences: so many come from `mixed`."""
    turns: tuple[int, ...] = ()
    """Of each rollback, in the order of time: the sequences of the order that had been read where it went back to."""

    def __post_init__(self) -> None:
        for split in self._splits:
            if split.rows(self.context) == 0:
                raise DatasetError(
                    f"the {split.name} split of the {'mixed-in ' if split is self.mixed else ''}dataset has "
                    f"{split.tokens} tokens, fewer than one row of context {self.context}: add data, or choose a "
                    "smaller context"
                )
        if fault := division_fault(self.batch, self.world_size, self.sharing):
            raise UserError(fault)

    @property
    def groups(self) -> int:
        """Groups of processes with rows of their own."""
        return self.world_size // self.sharing

    @cached_property
    def sequences(self) -> int:
        """Sequences of one forward pass of one process: the largest divisor of its share up to micro_batch."""
        share = self.batch // self.groups
        return next(size for size in range(min(self.micro_batch, share), 0, -1) if share % size == 0)

    @cached_property
    def num_micro(self) -> int:
        """Forward passes of one process in one optimizer step."""
        return self.batch // self.groups // self.sequences

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of optimizer step `step` (counted from 0), [batch]; those of `mixed` count on after the last of
        `split`."""
        first = self.skip + step * self.batch
        places = np.arange(first, first + self.batch, dtype=np.int64)
        turns = np.asarray(self.turns, dtype=np.int64)
        if self.mixed is None:
            return self._ordered(self.split, places, turns)
        parts = round(self.share * _PARTS)
        before, after = places * parts // _PARTS, (places + 1) * parts // _PARTS  # rows of `mixed` until then
        own, rows, mixed_turns = before == after, np.empty_like(places), turns * parts // _PARTS
        rows[own] = self._ordered(self.split, (places - before)[own], turns - mixed_turns)
        rows[~own] = self.split.rows(self.context) + self._ordered(self.mixed, before[~own], mixed_turns)
        return rows

    def labels(self) -> np.ndarray:
        """How many labels each row has, by its number in `rows`, int64."""
        return np.concatenate([split.labels(self.context) for split in self._splits])

    def micro(self, step: int, rank: int, index: int) -> Batch:
        """What `rank` sees in its forward pass `index` of step `step`; see `part_of`."""
        group, place = divmod(rank, self.sharing)
        start = (index * self.groups + group) * self.sequences
        return part_of(self._read(self.rows(step)[start : start + self.sequences]), place, self.sharing)

    @property
    def _splits(self) -> tuple[TokenSplit, ...]:
        return (self.split,) if self.mixed is None else (self.split, self.mixed)

    def _ordered(self, split: TokenSplit, places: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Rows of a split at places of its order, counted over all epochs. turns: those of its own order."""
        count = split.rows(self.context)
        epochs, places = np.divmod(places, count)
        rows = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = places[epochs == epoch]
            for number in range(len(turns), 0, -1):  # the last shuffle reorders what the earlier ones gave
                first = max(0, int(turns[number - 1]) - int(epoch) * count)
                rest = inside >= first
                shuffled = permute(inside[rest] - first, count - first, self.seed + (number << 32), int(epoch))
                inside[rest] = first + shuffled
            rows[epochs == epoch] = permute(inside, count, self.seed, int(epoch))
        return rows

    def _read(self, rows: np.ndarray) -> Batch:
        """Rows as one batch. Those of a dataset without masks count wholly beside one that has them."""
        if self.mixed is None:
            return self.split.batch(rows, self.context, document_ids=self.document_ids)
        count, sequences = self.split.rows(self.context), list[Batch]()
        for row in rows:
            split, own = (self.split, row) if row < count else (self.mixed, row - count)
            one = split.batch([int(own)], self.context, document_ids=self.document_ids)
            if self.split.mask_files and "loss_mask" not in one:
                one["loss_mask"] = torch.ones_like(one["input_ids"], dtype=torch.bool)
            sequences.append(one)
        names = {"input_ids", "document_ids"} | ({"loss_mask"} if self.split.mask_files else set())
        return {name: torch.cat([one[name] for one in sequences]) for name in sequences[0] if name in names}


def part_of(batch: Batch, place: int, sharing: int) -> Batch:
    """The part of a batch of whole rows that is at `place` (from 0) of as many equal parts as processes share it: the
    last label of a part is the first token of the next one. Document ids stay those of whole rows."""
    length = (batch["input_ids"].shape[1] - 1) // sharing
    here = slice(place * length, (place + 1) * length + 1)
    return {name: x if name == "document_ids" else x[:, here] for name, x in batch.items()}


def division_fault(batch: int, processes: int, sharing: int) -> str | None:
    """One line if processes cannot divide a batch, or rows among `sharing` of them."""
    if processes % sharing:
        return f"sequence_parallel ({sharing}) must divide the number of processes ({processes}); change one of the two"
    if batch % (processes // sharing):
        groups = f" / sequence_parallel ({sharing})" if sharing > 1 else ""
        return (
            f"batch ({batch}) must be a multiple of the number of processes ({processes}){groups}; "
            "change the recipe's batch, or resources.processes"
        )
    return None


def plan_batches(
    section: Training,
    split: TokenSplit,
    world_size: int,
    *,
    mixed: TokenSplit | None = None,
    rollbacks: Sequence[int] = (),
) -> list[BatchPlan]:
    """The batches of each part of a stage. A part goes on in the order of the earlier ones of its context, so that no
    row comes twice before all have come once; of another context, the rows are others.

    mixed: where the rows come from that the section mixes in. rollbacks: the steps gone back to, in the order of time;
    the rows after each come in another order. Raises UserError.
    """
    plans: list[BatchPlan] = []
    read: dict[int, int] = {}
    turns = [_read_until(section, step) for step in rollbacks]
    if (mixed is None) != (section.mixed is None):
        raise ValueError("a section that mixes rows in needs the dataset that they come from, and no other does")
    for part in section.parts:
        plan = BatchPlan(
            split,
            part.context,
            part.batch,
            part.micro_batch,
            section.seed,
            world_size,
            section.sequence_parallel,
            document_ids=section.reset_at_documents,
            skip=read.get(part.context, 0),
            mixed=mixed,
            share=0.0 if section.mixed is None else section.mixed.share,
            turns=tuple(turn.get(part.context, 0) for turn in turns),
        )
        plans.append(plan)
        read[part.context] = plan.skip + part.own_steps * part.batch
    return plans


def _read_until(section: Training, step: int) -> dict[int, int]:
    """Context → sequences that a stage has read after `step` optimizer steps."""
    read: dict[int, int] = {}
    for part in section.parts:
        done = min(step, part.own_steps)
        read[part.context] = read.get(part.context, 0) + done * part.batch
        step -= done
    return read
