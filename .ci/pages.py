"""What mkdocs needs besides docs/: the pages of results, which lie where benchmarks write them.

Links of docs/ go to ../benchmarks/results/NAME.md, as a git host wants them; in the site those pages lie in results/.
Links to other files of the project, which the site does not have, lose their target.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of results, and their pictures."""
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".md", ".svg"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to results go to where they lie in the site. Who searches for a key wants the page of keys first."""
    if page.file.src_uri == "keys.md":
        page.meta["search"] = {"boost": 4}
    source = Path(page.file.abs_src_path).parent

    def moved(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = (source / target).resolve()
        if path.parent == RESULTS and path.suffix in (".md", ".svg"):
            folder = "" if source == RESULTS else "results/"
            return f"[{words}]({folder}{path.name}{anchor})"
        inside = source == RESULTS or path.is_relative_to(ROOT / "docs")
        return link[0] if inside or not path.exists() else words

    return _LINK.sub(moved, markdown)
