"""The program of `radlads import-openmose` and `export-openmose`: weight files in, a folder out, on the CPU.

`python -m radlads.tasks.jobs.exchange.openmose request.json`; how it ended is in `exit.json` beside the request.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import TypeAdapter

from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.teacher.load import load_generation_config, load_teacher_config
from radlads.model.weights.openmose_weights import export_openmose, load_openmose
from radlads.tasks.contracts.requests.openmose import OpenMoseExport, OpenMoseImport
from radlads.tasks.jobs.exchange.outside_run import made_whole, run_request
from radlads.tasks.jobs.origin import write_origin
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher, resolve_teacher_path

logger = logging.getLogger("radlads")


def perform(request: OpenMoseImport | OpenMoseExport) -> None:
    """Make the folder `request.out` atomically; the whole model is held in memory. Raises UserError."""
    with made_whole(Path(request.out)) as folder:
        if isinstance(request, OpenMoseImport):
            _import(request, folder)
        else:
            export_openmose(load_student(request.student), folder, marker=request.marker)


def _import(request: OpenMoseImport, folder: Path) -> None:
    path, revision = resolve_teacher_path(request.teacher), request.revision
    tokenizer = load_tokenizer(request.teacher, revision=revision, trust_remote_code=request.trust_remote_code)
    config = load_teacher_config(path, revision=revision)
    student = load_openmose(
        request.weights,
        config,
        architecture=request.architecture,
        rope=request.rope,
        attention_rope=request.attention_rope,
    )
    student.generation_config = load_generation_config(path, config, revision=revision)
    reference = pin_teacher(request.teacher, revision=revision, trust_remote_code=request.trust_remote_code)
    write_origin(student.config, reference)
    export_student(student, tokenizer, folder)
    logger.info("%s, layers that stay attention: %s", student.config.variant, student.config.attention_layers or "none")


def main() -> None:
    """Read the request, execute it, write exit.json, exit."""
    run_request(TypeAdapter(OpenMoseImport | OpenMoseExport), perform)


if __name__ == "__main__":
    main()
