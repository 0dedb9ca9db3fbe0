"""The live table of a run at work, and what a run says at its end."""

from __future__ import annotations

import io
import json
import logging
import sys
import time

import pytest
from rich.console import Console

from radlads.flows.closing import VERDICTS, say_end
from radlads.flows.live_view import LiveTable, advanced, fitting
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.look.run_state import RunState
from radlads.tasks.look.stage_state import StageState
from radlads.tasks.observe import IS_PROGRESS


def state(*words: str) -> RunState:
    stages = [StageState(f"s{index}", "align", word) for index, word in enumerate(words)]
    return RunState(run="mine", store="/s", recipe="smoke", word="running", stages=stages)


def console(*, terminal: bool, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, height=height, _environ={})


def test_time_goes_on_between_two_looks() -> None:
    before = state("done", "running", "to do")
    before.stages[1].seconds, before.stages[1].seconds_left = 10.0, 4.0
    before.stages[0].seconds = 5.0
    after = advanced(before, 3.0)
    assert [stage.seconds for stage in after.stages] == [5.0, 13.0, None]
    assert after.stages[1].seconds_left == 1.0
    assert advanced(before, 9.0).stages[1].seconds_left == 0.0
    assert before.stages[1].seconds == 10.0


def test_a_low_terminal_shows_what_is_at_work() -> None:
    one = state("done", "done", "failed", "running", "to do", "to do")

    def labels(lines: int) -> list[str]:
        return [stage.label for stage in fitting(one, lines).stages]

    assert labels(6) == ["s0", "s1", "s2", "s3", "s4", "s5"]
    assert labels(4) == ["s2", "s3", "s4", "s5"]
    assert labels(3) == ["s2", "s3", "s4"]
    assert labels(0) == ["s2", "s3"]


class Looks:
    """Stands in for `look`."""

    def __init__(self, *found: RunState | Exception) -> None:
        self.found = list(found)

    def __call__(self, store, run, *, layout_checked=False):
        one = self.found.pop(0) if len(self.found) > 1 else self.found[0]
        if isinstance(one, Exception):
            raise one
        return one


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch):
    def put(*found: RunState | Exception) -> None:
        monkeypatch.setattr("radlads.flows.live_view.look", Looks(*found))

    monkeypatch.setattr("radlads.flows.live_view._LOOK_REMOTE_SECONDS", 0.01)
    return put


def test_log_lines_are_printed_above_the_table_and_progress_is_left_out(looks) -> None:
    looks(StoreError("away"), state("done", "running"))
    shown = console(terminal=True)
    logger = logging.getLogger("prefect.test_live_view")
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    kept = io.StringIO()
    handler.console = Console(file=kept)
    handler.emit = lambda record: handler.console.print(handler.format(record), soft_wrap=True)
    logger.addHandler(handler)
    stderr = sys.stderr
    try:
        with LiveTable(shown, object(), "mine"):
            end = time.monotonic() + 10
            while "s1" not in shown.file.getvalue() and time.monotonic() < end:
                time.sleep(0.02)
            logger.warning("the store is slow")
            logger.info("s1: 3 of 4 steps", extra={IS_PROGRESS: True})
    finally:
        logger.removeHandler(handler)
    text = shown.file.getvalue()
    assert "the store is slow" in text
    assert "3 of 4 steps" not in text
    assert text.rstrip().count("\x1b[?25h") == 1  # the cursor is shown again
    assert text.rindex("s1") > text.index("the store is slow")
    assert handler.console.file is kept
    assert sys.stderr is stderr
    assert not handler.filters


def test_away_from_a_terminal_nothing_is_drawn(looks) -> None:
    looks(state("running"))
    dumb = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, _environ={"TERM": "dumb"})
    for shown in (console(terminal=False), dumb):
        with LiveTable(shown, object(), "mine"):
            time.sleep(0.05)
        assert shown.file.getvalue() == ""


class Kept:
    """A store with one report."""

    def __init__(self, data: bytes | None) -> None:
        self.data, self.asked = data, []

    def key(self, uri: str) -> str:
        return uri.removeprefix("x://")

    def get_bytes(self, key: str) -> bytes | None:
        self.asked.append(key)
        return self.data


def test_the_end_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radlads.flows.closing.look", lambda *_, **__: state("done", "done"))
    verdicts = [{"level": "warning", "text": "It [lost] recall."}, {"level": "good", "text": "It keeps quality."}]
    store, out, said = Kept(json.dumps(verdicts).encode()), console(terminal=False), []
    made = {"run": "mine", "distill": "x://d", "publish": "x://p/1"}
    say_end(out, said.append, store, "mine", made)
    assert store.asked == [f"p/1/{VERDICTS}"]
    assert out.file.getvalue().splitlines() == ["! It [lost] recall.", "✓ It keeps quality."]
    assert said[:3] == ["run          mine", "distill      x://d", "publish      x://p/1"]
    assert "2 of 2 stages" in said[3]
    assert said[4:] == [
        "report   radlads report mine",
        "use      radlads chat mine   radlads serve mine   radlads export mine --to FOLDER",
    ]
    said.clear()
    say_end(out, said.append, Kept(None), "mine", {"pretrain": "x://t", "publish": "x://p/1"})
    assert said[-1] == "report   radlads report mine"

    def away(*_, **__):
        raise StoreError("away")

    monkeypatch.setattr("radlads.flows.closing.look", away)
    said.clear()
    say_end(out, said.append, Kept(None), "mine", {"evaluate": "x://e"})
    assert said == ["evaluate     x://e"]


def test_a_question_finds_the_terminal_free(looks) -> None:
    looks(state("running"))
    shown = console(terminal=True)
    with LiveTable(shown, object(), "mine") as table:
        with LiveTable.hidden():
            assert not table._live.is_started
            written = shown.file.getvalue()
            time.sleep(0.7)  # longer than between two frames
            assert shown.file.getvalue() == written
            shown.print("Run it? [y/N]")
            written = shown.file.getvalue()
        assert table._live.is_started
    before, _, after = shown.file.getvalue()[len(written) :].partition("mine")
    assert after
    assert "\x1b[1A" not in before  # the question is not drawn over
    with LiveTable.hidden():  # none is shown
        pass
