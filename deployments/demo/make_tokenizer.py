"""Make the demo teacher's tokenizer: byte-level BPE, digits one by one, trained on a text file.

python -m radlads.deployments.demo.make_tokenizer stories.txt.gz --separator '<|endoftext|>' --out tokenizer
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from radlads.tasks.jobs.data.text.recall import vocabulary

END = "<|endoftext|>"
PAD = "<|pad|>"


def make_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose end-of-text token is also its start token; deterministic for the same documents."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits: a number is remembered digit by digit, never guessed as a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The words of the recall text are as common in training as the stories' own: each becomes one token.
    recall = ["".join(f" {word}" for word in vocabulary())] * 2000
    tokenizer.train_from_iterator(documents + recall, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def main(
    text: Path,
    out: Annotated[Path, typer.Option()],
    separator: Annotated[str, typer.Option()] = END,
    vocab_size: Annotated[int, typer.Option()] = 2048,
) -> None:
    """Train on `text` (plain or .gz) and write a Hugging Face tokenizer folder."""
    raw = text.read_bytes()
    decoded = (gzip.decompress(raw) if text.suffix == ".gz" else raw).decode("utf-8")
    documents = [document.strip() for document in decoded.split(separator) if document.strip()]
    make_tokenizer(documents, vocab_size).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
