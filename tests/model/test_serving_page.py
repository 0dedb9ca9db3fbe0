"""The code of docs/serving.md runs as it stands, on an exported folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from radlads.model.student.export import export_student


def test_the_code_of_the_page_runs(make_teacher, make_student, project_root: Path, tmp_path: Path) -> None:
    page = (project_root / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    words = [f"w{i}" for i in range(60)]
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: i + 1 for i, word in enumerate(words)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    export_student(
        make_student(make_teacher("qwen3"), attention_layers=(1,)),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"),
        tmp_path / "model",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "prompt.safetensors").is_file()
    assert done.stdout.count("w") > 20
