"""dequantize: a GGUF teacher as a Hugging Face folder, with its tokenizer, for all stages and runs that read it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from radlads.model.teacher.gguf import check_gguf_tensors, dequantise, load_gguf_config, open_gguf
from radlads.model.teacher.load import load_teacher_config
from radlads.model.teacher.weights import open_teacher_weights
from radlads.tasks.contracts.disk import need_space
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import resolve_teacher_path
from radlads.tasks.contracts.specs import DequantizeSpec
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.sources import load_tokenizer
from radlads.tasks.jobs.teacher.gguf_file import describe_gguf

logger = logging.getLogger("radlads")

_PROBE = "Tim's 2 dogs ran 31,415 m —\n\n\t«voilà!», he said:  if x != 0:\n    return ∑ 数字 🙂"


def main(job: Job) -> dict[str, Any]:
    """Write model/ and dequantize.json. On the CPU; the whole model is in memory."""
    spec: DequantizeSpec = job.typed
    started, folder = time.monotonic(), job.output / "model"
    teacher = open_gguf(Path(resolve_teacher_path(spec.teacher.path)))
    config = load_gguf_config(teacher)
    check_gguf_tensors(teacher, config)
    numbers = sum(tensor.count for tensor in teacher.header.tensors)
    need_space(job.output, numbers * teacher.dtype.itemsize, "the dequantised teacher")
    parameters = dequantise(teacher, config, folder)
    _write_tokenizer(spec.teacher.path, folder)
    open_teacher_weights(str(folder), load_teacher_config(str(folder)))  # what other stages will read
    described = describe_gguf(teacher, spec.teacher.fingerprint)
    (job.output / "dequantize.json").write_text(described.model_dump_json(indent=1), encoding="utf-8")
    logger.info("%s: %s", described.name, described)
    return {"parameters": parameters, "file_bytes": teacher.header.size, "seconds": time.monotonic() - started}


def _write_tokenizer(path: str, folder: Path) -> None:
    """Write the file's tokenizer. Raises UserError if the written one reads text otherwise."""
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(str(folder))
    if again(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"] or again.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"the tokenizer of {path} changes when it is saved; give the model's Hugging Face folder")


if __name__ == "__main__":
    run_job(main)
