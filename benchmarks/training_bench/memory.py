"""What is in a GPU's memory when most is: the allocator's own record of a step, by the line of Python that asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_MOST_EVENTS = 2_000_000
_TOP = 25
_ROOT = str(Path(__file__).resolve().parents[2])
_OWN = ("model", "kernels", "tasks")
_SIGN = {"alloc": 1, "free_requested": -1}
_LIBRARIES = ("transformers", "deepspeed", "liger_kernel", "fla")


def begin_record() -> None:
    """Record allocations with their Python stacks from now on."""
    torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS, context="alloc", stacks="python")


def end_record(device: torch.device, held: int) -> dict[str, Any]:
    """End the record; the result of `at_peak`. held: bytes allocated when it began."""
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda._get_device_index(device, optional=True)]
    torch.cuda.memory._record_memory_history(enabled=None)
    return at_peak(trace, held)


def at_peak(trace: Sequence[Mapping[str, Any]], held: int) -> dict[str, Any]:
    """{peak_bytes, held_bytes, places}: of the recorded allocations those that live when their sum is largest, as
    [bytes, count, place], the largest first. held_bytes: what then remains of what was allocated before."""
    total = peak = held
    last = -1
    for index, event in enumerate(trace):
        total += _SIGN.get(event["action"], 0) * event["size"]
        if total > peak:
            peak, last = total, index
    live: dict[int, Mapping[str, Any]] = {}
    for event in trace[: last + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_requested":
            live.pop(event["addr"], None)
    places: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in live.values():
        place = place_of(event.get("frames", ()))
        places[place] += event["size"]
        counts[place] += 1
    rows = [[size, counts[place], place] for place, size in places.most_common(_TOP)]
    return {"peak_bytes": peak, "held_bytes": peak - sum(places.values()), "places": rows}


def place_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """`file:line function` of the innermost frame of this project, else of a library that it trains with."""
    for name in (*(f"{_ROOT}/{folder}/" for folder in _OWN), *(f"/{library}/" for library in _LIBRARIES)):
        for frame in frames:
            at = frame["filename"].find(name)
            if at >= 0:
                file = frame["filename"].removeprefix(_ROOT + "/")[-70:]
                return f"{file}:{frame['line']} {frame['name']}"
    return "backward pass of torch's own operators" if not frames else f"torch: {frames[0]['name']}"
