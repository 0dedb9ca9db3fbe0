"""Renders the blocks of a report as one self-contained HTML file, with inline style and pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from radlads.tasks.jobs.report.report_blocks import MARKS, Block, Code, Heading, Picture, Table, Text, Verdict

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #5b6470; --line: #d8dde3; --page: #fff; --soft: #f5f7f9;
  --good: #1a7f4b; --note: #2a62b8; --warning: #b23b12; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #9aa4af; --line: #363d45; --page: #15181b;
  --soft: #1e2226; --good: #4cc38a; --note: #7eaef5; --warning: #ff9467; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .5rem; border-top: 1px solid var(--line); }
p { margin: .75rem 0; max-width: 46rem; }
nav { margin: 1.5rem 0; font-size: .92rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
a { color: var(--note); }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--soft); padding: .1em .3em;
  border-radius: 3px; overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1rem;
  overflow-x: auto; }
pre code { padding: 0; background: none; overflow-wrap: normal; }
pre.wrap { white-space: pre-wrap; }
.verdict { border-left: 4px solid var(--note); background: var(--soft); padding: .55rem .9rem; margin: .5rem 0;
  border-radius: 0 6px 6px 0; }
.verdict b { color: var(--note); margin-right: .4rem; }
.good { border-color: var(--good); } .good b { color: var(--good); }
.warning { border-color: var(--warning); } .warning b { color: var(--warning); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; min-width: 24rem; }
caption { caption-side: bottom; text-align: left; color: var(--dim); padding-top: .5rem; font-size: .88rem; }
th, td { padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } thead th { border-bottom: 2px solid var(--line); color: var(--dim); }
td { white-space: nowrap; } td.words { white-space: normal; }
td.words, th.words, tbody th { text-align: left; } tbody th { font-weight: 500; padding-right: 1.6rem; }
figure { margin: 1.25rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem; }
figcaption { color: var(--dim); font-size: .88rem; margin-top: .4rem; max-width: 46rem; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--note); }
@media (max-width: 40rem) { thead { display: none; }
  table, caption, tbody, tr, tbody th, td { display: block; min-width: 0; }
  tr { border-bottom: 1px solid var(--line); padding: .5rem 0; } tbody th { font-weight: 600; white-space: normal; }
  th, td, td.words { border: 0; padding: .1rem 0; text-align: left; white-space: normal; overflow-wrap: anywhere; }
  td[data-of]::before { content: attr(data-of) ": "; color: var(--dim); } td:empty { display: none; } }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: .72rem; min-width: 0; } th, td { white-space: normal;
  padding-right: .5rem; overflow-wrap: anywhere; } details { display: none; } nav { display: none; } }
"""


def render_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The HTML page; pictures are read from `folder`."""
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    links = "".join(f'<a href="#{_anchor(text)}">{_inline(text)}</a>' for text in headings)
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_inline(title)}</h1>\n<nav aria-label="Sections">{links}</nav>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="{_anchor(text)}">{_inline(text)}</h2>'
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Verdict(level, text):
            return f'<div class="verdict {level}"><b>{MARKS[level]}</b>{_inline(text)}</div>'
        case Table():
            return _table(block)
        case Picture(file, alt, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt, quote=True)}">'
            return f"<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Code(text, _, folded):
            listing = f"<pre{'' if folded else _class('wrap')}><code>{html.escape(text.rstrip())}</code></pre>"
            return f"<details><summary>{_inline(folded)}</summary>{listing}</details>" if folded else listing


def _table(table: Table) -> str:
    classes = ["words" if i == 0 or name in table.words else "" for i, name in enumerate(table.header)]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{_inline(name)}</th>' for name, kind in zip(table.header, classes, strict=True)
    )
    rows = []
    for row in table.rows:
        first = f'<th scope="row">{_inline(row[0])}</th>'
        cells = zip(row[1:], classes[1:], table.header[1:], strict=True)
        rest = "".join(f"<td{_class(kind)}{_of(name)}>{_inline(cell)}</td>" for cell, kind, name in cells)
        rows.append(f"<tr>{first}{rest}</tr>")
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _of(heading: str) -> str:
    """The column's heading, shown beside the cell where a narrow page has no room for columns."""
    return f' data-of="{html.escape(heading, quote=True)}"' if heading else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _inline(text: str) -> str:
    """Escaped text, with backtick spans as <code>."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
