"""The half of gguf_llama_cpp.py that runs llama.cpp: `python llama_cpp_side.py request.json answer.npz`.

Needs llama-cpp-python alone, in a venv of its own. The request names the file, rows of tokens whose logits are wanted,
a prompt to continue greedily, texts to tokenize, messages to render, and numbers of threads; the answer has them as
arrays.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def opened(path: str, threads: int, *, words_only: bool = False) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        model_path=path,
        n_ctx=2048,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=not words_only,
        vocab_only=words_only,
        verbose=False,
    )


def logits_of(path: str, row: list[int], threads: int) -> np.ndarray:
    """[T, vocabulary], of a model that has read nothing before."""
    model = opened(path, threads)
    model.eval(row)
    return np.array(model.scores[: len(row)], dtype=np.float32)


def continued(model: llama_cpp.Llama, prompt: list[int], count: int) -> tuple[list[int], float, float]:
    """(likeliest tokens, tokens/s of the prompt, tokens/s of what follows)."""
    model.reset()
    began = time.perf_counter()
    model.eval(prompt)
    read = time.perf_counter()
    made: list[int] = []
    while len(made) < count:
        made.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(made[-1:])
    return made, len(prompt) / (read - began), count / (time.perf_counter() - read)


def main() -> None:
    """Answer one request."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    path, answer = request["file"], {}
    threads = request["threads"][-1]
    for i, row in enumerate(request["rows"]):
        answer[f"logits{i}"] = logits_of(path, row, threads)
    speeds = []
    for count in request["threads"] if request["new"] else []:
        model = opened(path, count)
        made, prompt_speed, speed = continued(model, request["prompt"], request["new"])
        answer["made"] = np.array(made)
        speeds.append([count, prompt_speed, speed])
    answer["speeds"] = np.array(speeds)
    words = opened(path, threads, words_only=True)
    for i, text in enumerate(request["texts"]):
        answer[f"ids{i}"] = np.array(words.tokenize(text.encode(), add_bos=False, special=True))
        answer[f"bytes{i}"] = np.frombuffer(words.detokenize(answer[f"ids{i}"].tolist(), special=True), dtype=np.uint8)
    template = words.metadata.get("tokenizer.chat_template")
    if template is not None:
        ends = {name: words._model.token_get_text(getattr(words, f"token_{name}")()) for name in ("bos", "eos")}
        formatter = Jinja2ChatFormatter(template, eos_token=ends["eos"], bos_token=ends["bos"])
        answer["chat"] = np.array(formatter(messages=request["messages"]).prompt)
    answer["version"] = np.array(llama_cpp.__version__)
    np.savez(sys.argv[2], **answer)


if __name__ == "__main__":
    main()
