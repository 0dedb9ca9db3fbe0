"""The page: markdown tables of the recorded units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rows import NUM_LAYERS, Record, Row

WAYS = ("even", "last", "difficulty", "recall")
Get = Callable[[Record], Any]


def tables(records: list[Record], rows: Mapping[str, Row], tokens: Mapping[str, int]) -> str:
    """All results so far; the latest record of a unit counts, a failure only if there is no result.

    tokens: of the stages align and distill.
    """
    latest: dict[str, Record] = {}
    for record in records:
        if "error" not in record or "error" in latest.get(record["key"], record):
            latest[record["key"]] = record
    good = [record for record in latest.values() if "error" not in record]
    failed = [record for record in latest.values() if "error" in record]
    by_unit = {
        kind: [r for r in good if r["unit"] == kind] for kind in ("pure", "hybrid", "control", "calibrated", "speed")
    }
    default = [name for name, row in rows.items() if row.kind == "default"]
    others = [name for name, row in rows.items() if row.kind != "default"]
    parts = [_teacher(good), "## Pure, default options", _pure(default, by_unit["pure"])]
    parts += ["## A quarter of the layers softmax", _hybrid(default, by_unit)]
    parts += ["## Each layer alone softmax, first seed", _single(default, by_unit["hybrid"] + by_unit["control"])]
    parts += ["## Calibration before align: alignment loss", _calibration(default, by_unit)]
    parts += ["## Tokens/s, alone on the device", _speed(default, by_unit["speed"])]
    parts += [
        "## Tokens/s inside the conversions above, several sharing the device",
        _shared(default, by_unit["pure"], tokens),
    ]
    parts += ["## Other constants, pure"]
    parts += [f"- {name}: `{rows[name].options}`" for name in others if any(r["row"] == name for r in good)]
    parts += [_pure(others, by_unit["pure"])]
    if failed:
        parts += ["## Failed", *(f"- {record['key']}: {record['error']}" for record in failed)]
    return "\n\n".join(part for part in parts if part).replace("\n\n- ", "\n- ")


def _teacher(good: list[Record]) -> str:
    needle = next((r for r in good if r["unit"] == "teacher_needle"), None)
    judged = next((r for r in good if "teacher_bits_per_byte" in r), None)
    told = [f"{judged['teacher_bits_per_byte']:.4f} bits per byte"] if judged else []
    told += [f"needle {needle['needle']:.3f} ({_lengths([needle])})"] if needle else []
    return f"Teacher: {', '.join(told)}." if told else ""


def _pure(names: list[str], records: list[Record]) -> str:
    columns: dict[str, Get] = {
        "align loss, step 0": lambda r: r["align_0"],
        "final": lambda r: r["align_final"],
        "KL after align": lambda r: r["kl_align"],
        "KL after distill": lambda r: r["kl"],
        "bits per byte": lambda r: r["bits_per_byte"],
        "top-1": lambda r: r["top1_agreement"],
        "needle": lambda r: r["needle"],
    }
    lines = _head(["row", *columns, "needle by length"])
    for name in names:
        own = _of(records, name)
        if own:
            cells = [_cell(map(get, own), 3 if "needle" in head else 4) for head, get in columns.items()]
            lines.append(_line([name, *cells, _lengths(own)]))
    return "\n".join(lines)


def _hybrid(names: list[str], units: dict[str, list[Record]]) -> str:
    heads = ["row", *(f"{way}: layers" for way in WAYS), *(f"{way}: needle" for way in WAYS)]
    lines = _head([*heads, *(f"{way}: KL" for way in WAYS), "KL pure", "choice: tokens, s"])
    for name in names:
        pure = _of(units["pure"], name)
        if not pure:
            continue
        found = {way: [_chosen(one, way, units["hybrid"]) for one in pure] for way in WAYS}
        layers = [" / ".join(",".join(map(str, one["choices"][way])) for one in pure) for way in WAYS]
        needles = [_cell([r["needle"] for r in found[way] if r], 3) for way in WAYS]
        kls = [_cell([r["kl"] for r in found[way] if r], 4) for way in WAYS]
        costs = " / ".join(f"{one['choice_tokens']:,}, {one['choice_seconds']:.1f}" for one in pure)
        lines.append(_line([name, *layers, *needles, *kls, _cell([one["kl"] for one in pure], 4), costs]))
    note = "Layers: of each seed. The choice's tokens are recall's; the other ways read none."
    return "\n".join([note, "", *lines])


def _chosen(pure: Record, way: str, records: list[Record]) -> Record | None:
    """The hybrid with the layers that a way chose in a pure unit."""
    same = (r for r in records if (r["row"], r["seed"]) == (pure["row"], pure["seed"]))
    return next((r for r in same if r["layers"] == pure["choices"][way]), None)


def _single(names: list[str], records: list[Record]) -> str:
    lines = _head(["row", *(f"layer {i}: {what}" for what in ("needle", "KL") for i in range(NUM_LAYERS))])
    for name in names:
        own = {tuple(r["layers"]): r for r in records if r["row"] == name and r["seed"] == 0}
        places = [own.get((layer,)) for layer in range(NUM_LAYERS)]
        cells = [_cell([r[key]] if r else [], digits) for key, digits in (("needle", 3), ("kl", 4)) for r in places]
        if own:
            lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _calibration(names: list[str], units: dict[str, list[Record]]) -> str:
    steps = {"step 0": "align_0", "step 100": "align_100", "final": "align_final"}
    lines = _head(["row", *(f"{step}{with_}" for step in steps for with_ in ("", ", calibrated"))])
    for name in names:
        own = [_of(units[kind], name) for kind in ("pure", "calibrated")]
        if any(own):
            cells = [_cell([r[key] for r in part if key in r], 4) for key in steps.values() for part in own]
            lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _speed(names: list[str], records: list[Record]) -> str:
    keys = {"align": "align", "distill": "distill", "align, large": "align_large", "distill, large": "distill_large"}
    lines = _head(["row", *keys])
    lines += [_line([r["row"], *(f"{r[key]:,.0f}" for key in keys.values())]) for n in names for r in _of(records, n)]
    return "\n".join(lines)


def _shared(names: list[str], records: list[Record], tokens: Mapping[str, int]) -> str:
    """Of the last seed alone: the first one's conversions compile the kernels."""
    lines = _head(["row", *tokens])
    for name in names:
        last = _of(records, name)[-1:]
        lines += [_line([name, *(f"{tokens[s] / r[f'{s}_seconds']:,.0f}" for s in tokens)]) for r in last]
    return "\n".join(lines)


def _of(records: list[Record], name: str) -> list[Record]:
    return sorted((r for r in records if r["row"] == name), key=lambda r: r["seed"])


def _lengths(records: list[Record]) -> str:
    lengths = records[0]["needle_by_length"]
    means = {n: sum(r["needle_by_length"][n] for r in records) / len(records) for n in lengths}
    return ", ".join(f"{n}: {mean:.2f}" for n, mean in means.items())


def _cell(values: Iterable[float], digits: int) -> str:
    found = list(values)
    if not found:
        return "–"
    mean = f"{sum(found) / len(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ({', '.join(f'{value:.{digits}f}' for value in found)})"


def _head(names: list[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
