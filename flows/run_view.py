"""The state of runs as text: one table that fits the terminal, plain lines where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from radlads.tasks.look.run_state import RunState
from radlads.tasks.look.stage_state import StageState
from radlads.tasks.plan_table import short_count, short_duration

_STYLES = {
    "running": "cyan",
    "done": "green",
    "finished": "green",
    "failed": "red",
    "died": "red",
    "silent": "red",
    "stopped": "yellow",
    "outdated": "yellow",
    "to do": "dim",
}
_SPARE = ("tok/s", "cost", "time", "loss", "left")
"""Columns of a stage that a narrow terminal does without, the first one first."""
_STALE_SECONDS = 30.0


def print_run(out: Console, state: RunState) -> None:
    """A run: a line that says where it stands, its stages, what it took and has to go."""
    for line in headline(state):
        out.print(line, highlight=False, soft_wrap=True)
    out.print(stage_table(state, out.width))
    for stage in state.stages:
        if stage.reason:
            out.print(f"[red]{escape(stage.label)}[/]: {escape(stage.reason)}", highlight=False, soft_wrap=True)
        for event in stage.events[-3:]:
            text = f"[yellow]{escape(stage.label)}[/]: {escape(event)}"
            out.print(text, highlight=False, soft_wrap=True)
    out.print(summary(state), highlight=False, markup=False, soft_wrap=True)
    advice = next_step(state)
    if advice:
        out.print(advice, highlight=False, markup=False, soft_wrap=True)


def headline(state: RunState) -> list[str]:
    """Name, recipe and state; then where it runs, or when it was last seen. With markup."""
    style = _STYLES.get(state.word, "")
    word = f"[{style}]{state.word}[/]" if style else state.word
    first = f"[bold]{escape(state.run)}[/] · {escape(state.recipe or 'recipe of another version')} · {word}"
    lines = [first + (f" · by {state.launcher}" if state.launcher != "local" else "")]
    seen = "" if state.last_seen_seconds is None else f"last seen {ago(state.last_seen_seconds)}"
    if state.word == "running":
        late = state.last_seen_seconds is not None and state.last_seen_seconds > _STALE_SECONDS
        lines.append(f"{escape(state.where)}{f'; {seen}' if late else ''}")
    elif state.word == "died":
        lines.append(f"its process has died; {seen}: {escape(state.where)}")
    elif state.word == "silent":
        lines.append(f"not heard of for over a minute, so it has probably died; {seen}: {escape(state.where)}")
    return lines


def stage_table(state: RunState, width: int) -> Table:
    """One row a stage, with as many columns as the width has room for."""
    rows = [_stage_row(stage, state) for stage in state.stages]
    used = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    for spare in ("", *_SPARE):
        used = [name for name in used if name != spare]
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
        for name in used:
            justify = "left" if name in ("stage", "state", "progress") else "right"
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(row[name] for name in used))
        if Measurement.get(_PROBE, _PROBE.options.update(max_width=1000), table).maximum <= width:
            break
    return table


def runs_table(runs: Sequence[RunState], width: int) -> Table:
    """One row a run, the newest last."""
    rows = [
        {
            "run": escape(run.run),
            "state": _styled(run.word),
            "stages": f"{run.done}/{len(run.stages)}",
            "at": escape(", ".join(_at(stage) for stage in run.current)),
            "left": _left(run) if run.is_alive else "",
            "since": f"{run.moved:%Y-%m-%d %H:%M}" if run.moved is not None else "",
            "recipe": escape(run.recipe),
        }
        for run in runs
    ]
    used = list(rows[0]) if rows else []
    table = Table()
    for spare in ("", "recipe", "since", "left", "at"):
        used = [name for name in used if name != spare]
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
        for name in used:
            table.add_column(name, no_wrap=name != "run", overflow="fold")
        for row in rows:
            table.add_row(*(row[name] for name in used))
        if Measurement.get(_PROBE, _PROBE.options.update(max_width=1000), table).maximum <= width:
            break
    return table


def side_by_side(title: str, headings: Sequence[str], rows: Mapping[str, Sequence[str]], width: int) -> Table:
    """A row for each key, a column for each heading. Where the columns do not fit, a line for each cell."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for heading in (title, *headings):
        table.add_column(escape(heading), overflow="fold")
    for key, cells in rows.items():
        table.add_row(escape(key), *map(escape, cells))
    if Measurement.get(_PROBE, _PROBE.options.update(max_width=1000), table).maximum <= width:
        return table
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for key, cells in rows.items():
        table.add_row(f"[bold]{escape(key)}[/]", "")
        for heading, cell in zip(headings, cells, strict=True):
            table.add_row(f"  {escape(heading)}", escape(cell))
    return table


def summary(state: RunState) -> str:
    """What the run took so far and what it has to go, in one line."""
    parts = [f"{state.done} of {len(state.stages)} stages"]
    seconds, hours, dollars = (state.total(name) for name in ("seconds", "gpu_hours", "dollars"))
    if seconds:
        parts.append(f"{short_duration(seconds)} of jobs so far")
    if hours:
        parts.append(f"{hours:,.1f} GPU hours")
    if dollars is not None:
        parts.append(f"${dollars:,.2f} so far")
    if state.word != "finished" and state.seconds_left is not None:
        parts.append(f"about {_left(state)} to go")
    return f"in all   {', '.join(parts)}"


def next_step(state: RunState) -> str:
    """The command that helps now; "" where none does."""
    if state.word == "finished":
        return f"report   radlads report {state.run}" if any(s.stage == "publish" for s in state.stages) else ""
    if state.word == "running":
        return ""
    return f"next     radlads resume {state.run}" + ("" if state.word == "stopped" else f"; radlads logs {state.run}")


def plain_line(state: RunState) -> str:
    """The state in one line, for a log: of what is at work, without times that always change."""
    at = ", ".join(_at(stage) for stage in state.current)
    return f"{state.run}: {state.word}, {state.done} of {len(state.stages)} stages{f'; {at}' if at else ''}"


def ago(seconds: float) -> str:
    """ "12 min ago" """
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} days ago"
    return f"{short_duration(max(0.0, seconds))} ago"


_PROBE = Console(width=1000, file=None, force_terminal=False)


def _stage_row(stage: StageState, run: RunState) -> dict[str, str]:
    by = f" from {escape(stage.made_by)}" if stage.made_by and stage.word == "done" else ""
    word = _styled(stage.word) if not by else f"[green]reused[/]{by}"
    if stage.word == "waiting":
        word = f"waiting for {escape(stage.made_by)}"
    progress = ""
    if stage.share is not None and stage.word != "done":
        progress = f"{short_count(stage.done)}/{short_count(stage.total)} {escape(stage.unit)} {stage.share:.0%}"
    left = "" if stage.word in ("done", "failed") else short_duration(stage.seconds_left)
    cost = "" if stage.gpu_hours is None else f"{stage.gpu_hours:,.1f} GPU h"
    return {
        "stage": escape(stage.label),
        "state": word,
        "progress": progress,
        "loss": "" if stage.loss is None else f"{stage.loss:.4g}",
        "tok/s": short_count(stage.tokens_per_second),
        "time": short_duration(stage.seconds),
        "left": left,
        "cost": cost if stage.dollars is None else f"${stage.dollars:,.2f}",
    }


def _styled(word: str) -> str:
    style = _STYLES.get(word, "")
    return f"[{style}]{word}[/]" if style else word


def _at(stage: StageState) -> str:
    if stage.word == "waiting":
        return f"{stage.label} waits for {stage.made_by}"
    share = "" if stage.share is None else f" {stage.share:.0%}"
    loss = "" if stage.loss is None else f", loss {stage.loss:.4g}"
    return f"{stage.label}{share}{loss}" + ("" if stage.word in ("running", "begun") else f" ({stage.word})")


def _left(state: RunState) -> str:
    if state.seconds_left is None:
        return ""
    return short_duration(state.seconds_left) + ("" if state.left_is_whole else " or more")
