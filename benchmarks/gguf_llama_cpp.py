"""GGUF files in llama.cpp: logits, greedy tokens, tokenizer and chat template against the student in torch.

    python3 -m venv llama && llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    python3 benchmarks/gguf_llama_cpp.py --llama llama/bin/python [--out benchmarks/results/gguf_llama_cpp.md]
    python3 benchmarks/gguf_llama_cpp.py --llama llama/bin/python --folder path/to/student

The first line compiles llama.cpp for this CPU, for about 15 minutes on two cores. Without --folder students of random
weights are made, of every kind that is exported, with the demo's tokenizer; `--tokenizer FOLDER` compares further
tokenizers, each in a tiny model. Reference is the student in fp32. The column `rounded` is that student with its
matrices rounded to the file's type, computed in fp32: what the type alone costs.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from radlads.model.convert.transplant import transplant
from radlads.model.llama_cpp.graphs import open_for_llama_cpp
from radlads.model.llama_cpp.vocabulary import read_vocabulary
from radlads.model.llama_cpp.write import Card, write_gguf
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student, load_student
from radlads.tasks.jobs.sources import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SIDE = Path(__file__).with_name("llama_cpp_side.py")
DEMO = ROOT / "deployments" / "demo" / "tokenizer"
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "initializer_range": 0.05,
}
TINY = {**SIZES, "hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
STUDENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rwkv7": ("rwkv7", {}, "llama"),
    "rwkv7, bare": ("rwkv7", {"gate": False, "group_norm": False, "token_shift": False}, "llama"),
    "cxa075": ("cxa075", {}, "llama"),
    "rad_rwkv7, groupnorm": ("rad_rwkv7", {"form": "groupnorm", "rope": False}, "llama"),
    "rad_rwkv6 of qwen2": ("rad_rwkv6", {"decay_shift": -2.0}, "qwen2"),
    "rad_rwkv6, bare": ("rad_rwkv6", {"decay_shift": -2.0, "token_shift": False, "gate": "none"}, "llama"),
}
TEXTS = (
    "Once upon a time, there was a little girl named Lily. She didn't like her mum's soup.",
    'def f(x):\n    return {\'a\': [x**2 for _ in range(1024)], "b": 3.14159}\n\n\n\tif f(7)["a"] != None:\n\t\tpass',
    "Größe, naïve café – “quotes” … 漢字とかな 한국어 русский язык العربية हिन्दी 👩‍🚀🚀 \u00a0 x²+y³",
    "1234567890 12,345.67 v2.0.1   three   spaces\n \n\t\ttabs  \r\nI'M YOU'LL they've",
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who was Tim?"},
    {"role": "assistant", "content": "A boy."},
    {"role": "user", "content": "Where was he?"},
]
say = logging.getLogger("gguf_llama_cpp").info


@torch.no_grad()
def make_student(folder: Path, tokenizer: Any, variant: str, options: dict[str, Any], family: str, sizes: Any) -> Path:
    """A student whose parameters are all random."""
    torch.manual_seed(0)
    words = -(-len(tokenizer) // 64) * 64
    config = AutoConfig.for_model(family, vocab_size=words, max_position_embeddings=2048, **sizes)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    student = build_student(config, variant=variant, options=options, attention_layers=(), attention_rope=False)
    transplant(teacher, student.float())
    for mixer in student.mixers().values():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    student.lm_head.weight.mul_(2)
    student.generation_config.eos_token_id = None
    return export_student(student.eval(), tokenizer, folder)


@dataclass
class Answer:
    """What one file gave, beside what it should."""

    student: str
    kind: str
    megabytes: float
    spread: float
    """Standard deviation of the student's logits."""
    worst: float
    worst_rounded: float
    divergence: float
    divergence_rounded: float
    top: float
    greedy: int
    speeds: list[list[float]]
    torch_speed: float


def ask(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp makes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.npz"
        asked.write_text(json.dumps(request))
        subprocess.run([python, str(SIDE), str(asked), str(answered)], check=True)
        with np.load(answered) as found:
            return dict(found)


def distance(expected: list[torch.Tensor], found: list[torch.Tensor]) -> tuple[float, float, float]:
    """(largest difference of logits, mean KL in nats, share of equal likeliest tokens) over all positions."""
    a, b = torch.cat(expected).double(), torch.cat(found).double()
    logs = a.log_softmax(-1)
    divergence = (logs.exp() * (logs - b.log_softmax(-1))).sum(-1).mean()
    return (a - b).abs().max().item(), divergence.item(), (a.argmax(-1) == b.argmax(-1)).double().mean().item()


def rounded_logits(folder: Path, rows: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    student = load_student(folder, dtype=torch.float32)
    for name, parameter in student.named_parameters():
        if parameter.ndim == 2 and re.search(r"(_proj|gate|embed_tokens|lm_head)\.weight|g[12]$", name):
            parameter.data.copy_(parameter.to(dtype))
    return [student(torch.tensor([row])).logits[0] for row in rows]


def generated(student: Any, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """(the likeliest tokens, tokens/s after the prompt)."""
    times = []
    for new in (1, count):
        began = time.perf_counter()
        made = student.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None)
        times.append(time.perf_counter() - began)
    return made[0, prompt.shape[1] :], (count - 1) / max(1e-9, times[1] - times[0])


@torch.no_grad()
def compare(name: str, folder: Path, python: str, options: argparse.Namespace) -> list[Answer]:
    """One student, in every type."""
    tokenizer, student = load_tokenizer(str(folder)), load_student(folder, dtype=torch.float32)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    long = [token for row in ids for token in row] * 20
    rows = [ids[0], long[: options.context]]
    expected = [student(torch.tensor([row])).logits[0] for row in rows]
    prompt = torch.tensor([long[:64]])
    made, torch_speed = generated(student, prompt, options.new)
    opened, answers = open_for_llama_cpp(folder), []
    vocabulary = read_vocabulary(tokenizer, opened.num_words)
    request = {"rows": rows, "prompt": prompt[0].tolist(), "new": options.new, "threads": options.threads, "texts": []}
    for kind in options.types:
        dtype = TYPES[kind]
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.gguf"
            write_gguf(opened, vocabulary, Card(name), path, dtype=dtype)
            found = ask(python, {**request, "messages": MESSAGES, "file": str(path)})
            size = path.stat().st_size / 1e6
        worst, divergence, top = distance(expected, [torch.tensor(found[f"logits{i}"]) for i in range(len(rows))])
        worst_rounded, divergence_rounded, _ = distance(expected, rounded_logits(folder, rows, dtype))
        answers.append(
            Answer(
                student=name,
                kind=kind,
                megabytes=size,
                spread=torch.cat(expected).std().item(),
                worst=worst,
                worst_rounded=worst_rounded,
                divergence=divergence,
                divergence_rounded=divergence_rounded,
                top=top,
                greedy=int((torch.tensor(found["made"]) == made).long().cumprod(0).sum()),
                speeds=found["speeds"].tolist(),
                torch_speed=torch_speed,
            )
        )
        say("%s", answers[-1])
    return answers


def compare_words(folder: Path, tokenizer: Any, python: str) -> str:
    """A row of the table of tokenizers; folder: of a student with it."""
    opened = open_for_llama_cpp(folder)
    vocabulary = read_vocabulary(tokenizer, opened.num_words)
    stories = [line for line in (ROOT / "README.md").read_text().splitlines() if line.strip()]
    texts = [*TEXTS, *stories]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.gguf"
        write_gguf(opened, vocabulary, Card("words"), path, dtype=torch.float16)
        request = {"file": str(path), "rows": [], "prompt": [], "new": 0, "threads": [1]}
        found = ask(python, {**request, "texts": texts, "messages": MESSAGES})
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    equal = sum(found[f"ids{i}"].tolist() == ids for i, ids in enumerate(expected))
    back = sum(bytes(found[f"bytes{i}"]).decode().strip() == text.strip() for i, text in enumerate(texts))
    chat = "none"
    if "chat" in found:
        wanted = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        chat = "equal" if str(found["chat"]) == wanted else f"differs: {str(found['chat'])!r}"
    count = sum(map(len, expected))
    name = tokenizer.name_or_path.rstrip("/").rsplit("/", 1)[-1]
    kind = f"{vocabulary.model}, {vocabulary.pre}"
    return f"| {name} | {kind} | {equal} of {len(texts)} ({count:,} tokens) | {back} of {len(texts)} | {chat} |"


def table(answers: list[Answer]) -> list[str]:
    """Markdown."""
    if not answers:
        return []
    threads = [int(speed[0]) for speed in answers[0].speeds]
    named = " / ".join(map(str, threads))
    lines = [
        "| student | type | MB | logits' deviation | largest difference | rounded | KL, nats a token | rounded | "
        f"top-1 equal | greedy equal | prompt tokens/s, {named} thread{'s' * (named != '1')} | decoding | torch fp32 |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in answers:
        prompts, decodes = (" / ".join(f"{speed[i]:,.0f}" for speed in one.speeds) for i in (1, 2))
        lines.append(
            f"| {one.student} | {one.kind} | {one.megabytes:.1f} | {one.spread:.2f} | {one.worst:.1e} | "
            f"{one.worst_rounded:.1e} | {one.divergence:.1e} | {one.divergence_rounded:.1e} | {one.top:.2%} | "
            f"{one.greedy} | {prompts} | {decodes} | {one.torch_speed:,.0f} |"
        )
    return lines


def words_of(path: str) -> Any:
    """A tokenizer, with a chat template where it has none."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (ROOT / "deployments" / "chat_templates" / "chatml.jinja").read_text()
    return tokenizer


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", required=True, help="Python of the venv with llama-cpp-python.")
    parser.add_argument("--folder", type=Path, help="A student's folder instead of students of random weights.")
    parser.add_argument("--students", nargs="*", choices=STUDENTS, default=list(STUDENTS), help="Kinds to make.")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="Types of the matrices.")
    parser.add_argument("--tokenizer", nargs="*", default=[], help="Folders of further tokenizers.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--context", type=int, default=600, help="Tokens of the longer row; 512 are read at once.")
    parser.add_argument("--new", type=int, default=64, help="Tokens that are continued greedily.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(max(options.threads))
    answers: list[Answer] = []
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        if options.folder:
            answers = compare(options.folder.name, options.folder, options.llama, options)
            rows.append(compare_words(options.folder, load_tokenizer(str(options.folder)), options.llama))
        for i, name in enumerate(options.students if not options.folder else ()):
            folder = make_student(Path(place) / str(i), words_of(str(DEMO)), *STUDENTS[name], SIZES)
            answers += compare(name, folder, options.llama, options)
        for i, path in enumerate([*([] if options.folder else [str(DEMO)]), *options.tokenizer]):
            tokenizer = words_of(path)
            folder = make_student(Path(place) / f"words{i}", tokenizer, "rwkv7", {}, "llama", TINY)
            rows.append(compare_words(folder, tokenizer, options.llama))
    version = subprocess.run(
        [options.llama, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    shown = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    lines = [
        "# GGUF files in llama.cpp",
        "",
        f"{date.today()}, llama-cpp-python {version}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.machine()} CPU.",
        "",
        f"    python3 benchmarks/gguf_llama_cpp.py {' '.join(shown)}",
        "",
        *table(answers),
        "",
        "| tokenizer | in the file | texts with equal tokens | texts that come back | chat template |",
        "|---|---|--:|--:|---|",
        *rows,
        "",
    ]
    if options.out:
        options.out.write_text("\n".join(lines))
    else:
        sys.stdout.write("\n".join(lines))


if __name__ == "__main__":
    main()
