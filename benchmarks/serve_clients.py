"""Tokens a second of `radlads serve` by the number of clients that ask at once.

    python3 benchmarks/serve_clients.py [--shape qwen2.5-0.5b] [--keep 3 7] [--device cuda] [--clients 1 4 16 32]

Makes a random-weight student of a public shape and serves it in this process; clients are threads that ask through
HTTP, each for answers of the same length to prompts of different lengths, one after the other. The first row is
generate() alone, which is what one client at a time would get. Each number of clients is measured once after one warm
round. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training_bench.shapes import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.tasks.contracts.requests.serve import ServeRequest, ServingLimits
from radlads.tasks.contracts.requests.talk import Talker
from radlads.tasks.jobs.serve.server import bind, build
from radlads.tasks.jobs.talk.opening import OpenedModels

say = logging.getLogger("serve_clients").info


def make_model(options: argparse.Namespace) -> torch.nn.Module:
    """A random student in bf16 on a GPU, fp32 on a CPU."""
    shape = dict(SHAPES[options.shape])
    shape |= {"num_hidden_layers": options.layers} if options.layers else {}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(options.device):
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        student = build_student(
            config, variant=options.variant, options={}, attention_layers=tuple(options.keep), attention_rope=False
        )
    transplant(teacher, student.to(dtype))
    student.generation_config.eos_token_id = None
    return student.eval()


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Words, of which a prompt is made; the model's other tokens have no text."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i + 1 for i in range(1000)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return tokenizer


def ask(port: int, number: int, options: argparse.Namespace) -> tuple[int, float]:
    """(tokens of an answer, seconds to its first part)."""
    prompt = [1 + (number * 7 + i) % 999 for i in range(options.prompt - options.prompt // 4 + number % 8)]
    body = {"model": "bench", "prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    began, first, tokens = time.perf_counter(), 0.0, 0
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body | {"stream_options": {"include_usage": True}}),
        {"Content-Type": "application/json"},
    )
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            told = json.loads(line[6:])
            first = first or time.perf_counter() - began
            tokens = (told.get("usage") or {}).get("completion_tokens", tokens)
    return tokens, first


def measure(port: int, clients: int, options: argparse.Namespace) -> tuple[float, float]:
    """(tokens a second of all clients, median seconds to a first part)."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda n: ask(port, n, options), range(clients)))
        began = time.perf_counter()
        found = list(pool.map(lambda n: ask(port, n, options), range(clients * options.rounds)))
        spent = time.perf_counter() - began
    return sum(tokens for tokens, _ in found) / spent, sorted(first for _, first in found)[len(found) // 2]


def measure_generate(model: torch.nn.Module, options: argparse.Namespace) -> float:
    """Tokens a second of generate() for one prompt after the other."""
    ids = torch.randint(1, 999, (1, options.prompt), device=options.device)
    for _ in range(2):
        began = time.perf_counter()
        made = model.generate(ids, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)
        tokens = (made.shape[1] - options.prompt) / (time.perf_counter() - began)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--variant", default="rad_rwkv7")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="layers that stay attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = make_model(options), make_tokenizer(Path(folder))
        request = ServeRequest(
            talkers=(Talker(name="student", path=folder, is_student=True),),
            tokenizer=folder,
            name="bench",
            port=0,
            limits=ServingLimits(),
        )
        say(f"{options.shape}, {options.variant}, kept layers {options.keep or 'none'}, {options.device}")
        say("| clients | tokens/s of all | first token after, s |\n| --: | --: | --: |")
        say(f"| generate() | {measure_generate(model, options):,.0f} | |")
        listener = bind(request.host, request.port)
        port = listener.getsockname()[1]
        server = build(request, OpenedModels({"student": model}, tokenizer, None), None, port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        for clients in options.clients:
            rate, first = measure(port, clients, options)
            say(f"| {clients} | {rate:,.0f} | {first:.3f} |")
        server.worker.stop()
        server.should_exit = True
        thread.join()
        server.worker.join()


if __name__ == "__main__":
    main()
