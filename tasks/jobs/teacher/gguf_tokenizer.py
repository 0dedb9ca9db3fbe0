"""The tokenizer that a GGUF file holds."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from radlads.model.weights.gguf_header import read_gguf_header

_TOKENS = "tokenizer.ggml.tokens"


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """As transformers reads it, from the file's header. Raises UserError, and what transformers raises."""
    count = read_gguf_header(path).settings.get(_TOKENS, 0)
    # Not through AutoTokenizer, which makes the same, and for that reads the whole file for seconds.
    tokenizer = PreTrainedTokenizerFast(gguf_file=path.name, name_or_path=str(path.parent))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    known = [token for token in state["added_tokens"] if token["id"] < count]
    if len(known) == len(state["added_tokens"]):
        return tokenizer
    # transformers adds GPT-2's <|endoftext|> to every vocabulary of its kind, with an id that the model does not have.
    state["added_tokens"] = known
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )
