"""Make the demo's corpus: of the documents that the demo teacher wrote (the `sample` source), those that are stories.

    python -m radlads.deployments.demo.make_corpus samples-0.jsonl --out stories.txt.gz

The teacher also learned recall documents and repeated lists of words, and writes them too; those are left out, since
recipes generate recall text themselves.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated

import typer

from radlads.deployments.demo.make_tokenizer import END


def is_story(text: str) -> bool:
    """Whether a document reads as prose: sentences, no recall questions, few repeated passages."""
    words = text.split()
    if len(words) < 40 or ("? The " in text and " says " in text):
        return False
    runs = {tuple(words[i : i + 5]) for i in range(len(words) - 5)}
    ends = sum(word[-1] in '.!?"' for word in words)
    return len(runs) > 0.9 * (len(words) - 5) and ends > len(words) / 30


def main(samples: Path, out: Annotated[Path, typer.Option()]) -> None:
    """Write the stories of a samples-N.jsonl file, separated by the end-of-text mark."""
    rows = [json.loads(line)["text"] for line in samples.read_text(encoding="utf-8").splitlines()]
    text = f"\n{END}\n".join(row for row in rows if is_story(row))
    out.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


if __name__ == "__main__":
    typer.run(main)
