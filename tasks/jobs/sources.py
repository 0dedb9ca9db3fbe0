"""Teachers, tokenizers and texts of a job: their places and pins, and the loader of tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from radlads.tasks.contracts.errors import UserError, first_line
from radlads.tasks.contracts.pins.pins import pin_teacher, pinned_commit, tokenizer_fingerprint
from radlads.tasks.contracts.pins.places import (
    demo_folder,
    expand_paths,
    is_gguf,
    resolve_file,
    resolve_teacher_path,
    resolve_tokenizer_path,
)
from radlads.tasks.jobs.teacher.gguf_tokenizer import load_gguf_tokenizer

__all__ = [
    "demo_folder",
    "expand_paths",
    "first_line",
    "load_tokenizer",
    "pin_teacher",
    "pinned_commit",
    "resolve_file",
    "resolve_teacher_path",
    "tokenizer_fingerprint",
]

_OTHER_FORM = "give another GGUF file of the model, or its Hugging Face folder"


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher folder, a student's folder, a GGUF file or a hub id, of the class that it names.

    Raises UserError when there is none, its files are damaged, it has no EOS token, or its class is not available:
    transformers then silently uses another one, which may split text differently.
    """
    resolved, config = resolve_tokenizer_path(path), dict[str, Any]()
    try:
        tokenizer: PreTrainedTokenizerBase
        if is_gguf(resolved):
            tokenizer = load_gguf_tokenizer(Path(resolved))
        else:
            config = get_tokenizer_config(resolved, revision=revision)
            _check_class_is_known(path, config, trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(resolved, revision=revision, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # any error of its files: the tokenizers library raises nothing narrower
        mend = f"; {_OTHER_FORM}" if is_gguf(resolved) else ""
        raise UserError(f"no usable tokenizer in {path}: {first_line(error).rstrip('.')}{mend}") from error
    own = _own_classes(config)
    loaded = type(tokenizer).__name__
    if own and trust_remote_code and loaded not in own:
        raise UserError(f"the tokenizer of {path} is {own[0]} of its own code, but transformers loaded {loaded}")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"the tokenizer of {path} has no vocabulary, which is what transformers makes of a folder without one; put "
            "the model's tokenizer.json and tokenizer_config.json there"
        )
    if tokenizer.eos_token_id is None:
        mend = _OTHER_FORM if is_gguf(resolved) else "set `eos_token` in its tokenizer_config.json"
        raise UserError(f"the tokenizer of {path} has no EOS token; {mend}")
    return tokenizer


def _check_class_is_known(path: str, config: dict[str, Any], trusted: bool) -> None:
    references, named = _references(config), config.get("tokenizer_class")
    elsewhere = [reference for reference in references if "--" in reference]
    if elsewhere and trusted:
        raise UserError(
            f"the tokenizer of {path} takes its code from another repository ({elsewhere[0].split('--')[0]}), which "
            "is not pinned; copy that code into a folder of your own beside the tokenizer's files"
        )
    if trusted and references:
        return
    known = named is None or tokenizer_class_from_name(named) is not None
    if references and (named is None or not known):
        raise UserError(
            f"the tokenizer of {path} is a class of its own ({_class_name(references[0])}), and its code is not run "
            "unless trust_remote_code is on; set it in the recipe's `teacher` once you have read that code"
        )
    if not known:
        raise UserError(
            f"the tokenizer of {path} names a class that transformers does not have ({named}) and brings no code for "
            "it; if its tokenizer.json is whole, set `tokenizer_class` to PreTrainedTokenizerFast in its "
            "tokenizer_config.json"
        )


def _references(config: dict[str, Any]) -> list[str]:
    """`module.Class` of a tokenizer that brings its own code; none of any other."""
    raw = config.get("auto_map") or ()
    found = raw.get("AutoTokenizer") or () if isinstance(raw, dict) else raw
    return [reference for reference in ([found] if isinstance(found, str) else found) if reference]


def _own_classes(config: dict[str, Any]) -> list[str]:
    return [_class_name(reference) for reference in _references(config)]


def _class_name(reference: str) -> str:
    return reference.rpartition(".")[2]
