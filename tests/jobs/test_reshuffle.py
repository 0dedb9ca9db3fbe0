"""The order of the rows after rollbacks: what was read stays as it was, and every row still comes once an epoch."""

from __future__ import annotations

import numpy as np
import pytest

from radlads.tasks.contracts.recipe.losses import ExtendPhase
from radlads.tasks.contracts.recipe.recipe import Distill, Extend, Phase
from radlads.tasks.contracts.recipe.training import MixedRows
from radlads.tasks.jobs.data.batch_plan import plan_batches
from radlads.tasks.jobs.data.loader import open_dataset


class Rows:
    """A split as a plan sees it: so many rows of any context."""

    name, tokens, mask_files = "train", 10**6, ()

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self, context: int) -> int:
        return self.count


def orders(section, rollbacks=(), mixed=None):
    """Step → its rows, of a stage over 23 rows (and 11 mixed in)."""
    plans = plan_batches(section, Rows(23), 1, mixed=mixed and Rows(11), rollbacks=rollbacks)
    return [plans[part].rows(own).tolist() for part, own in map(section.place, range(section.num_steps))]


SECTION = Distill(tokens=30 * 4 * 32, context=32, batch=4)


@pytest.mark.parametrize("rollbacks", [(3,), (0,), (7, 4), (4, 7), (2, 2), (9, 3, 6)])
def test_what_was_read_before_stays_and_an_epoch_still_has_every_row_once(rollbacks):
    """Also of a second rollback: what came between the two is as the first had made it."""
    history = orders(SECTION)
    for count, target in enumerate(rollbacks, 1):
        now = orders(SECTION, rollbacks[:count])
        assert now[:target] == history[:target]
        assert now[target : target + 3] != history[target : target + 3]
        rows = np.concatenate(now)
        for epoch in range(5):
            assert sorted(rows[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
        history = now


def test_mixed_rows_keep_their_places_and_each_dataset_its_epochs():
    section = Extend(
        tokens=40 * 4 * 32, context=32, batch=4, recall=MixedRows(data="recall", share=0.3),
        phases=(ExtendPhase(tokens=40 * 4 * 32),),
    )  # fmt: skip
    before, after = (np.concatenate(orders(section, turns, mixed=True)) for turns in ((), (5,)))
    assert (before[:20] == after[:20]).all()
    assert (before != after).any()
    assert ((before >= 23) == (after >= 23)).all()
    for rows, count in ((after[after < 23], 23), (after[after >= 23] - 23, 11)):
        assert sorted(rows[:count]) == list(range(count))
        assert sorted(rows[count : 2 * count]) == list(range(count))


def test_later_phases_of_the_same_context_go_on_in_the_new_order():
    phases = (Phase(tokens=4 * 4 * 32), Phase(tokens=4 * 4 * 48, context=48), Phase(tokens=4 * 4 * 32))
    section = Distill(tokens=sum(phase.tokens for phase in phases), context=32, batch=4, phases=phases)
    history, early, late = (orders(section, turns) for turns in ((), (2,), (6,)))
    assert early[:2] == history[:2]
    assert late[:6] == history[:6]
    assert late[6:8] != history[6:8]
    assert sorted(np.concatenate(early[:4] + early[8:])[:23]) == list(range(23))
    assert [early[i] != history[i] for i in (2, 4, 9)] == [True, True, True]


def test_real_rows_of_a_dataset_follow(training):
    split = open_dataset(training.root / "data").split("train")
    plain, turned = (plan_batches(SECTION, split, 1, rollbacks=turns)[0] for turns in ((), (1,)))
    assert plain.micro(0, 0, 0)["input_ids"].equal(turned.micro(0, 0, 0)["input_ids"])
    assert not plain.micro(1, 0, 0)["input_ids"].equal(turned.micro(1, 0, 0)["input_ids"])
