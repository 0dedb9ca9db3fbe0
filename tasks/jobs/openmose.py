"""The program of `radlads import-openmose` and `export-openmose`: weight files in, a folder out, on the CPU.

`python -m radlads.tasks.jobs.openmose request.json`; how it ended is in `exit.json` beside the request.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

from pydantic import TypeAdapter

from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.teacher.load import load_generation_config, load_teacher_config
from radlads.model.weights.openmose_weights import export_openmose, load_openmose
from radlads.tasks.contracts.job import ExitReason
from radlads.tasks.contracts.parsing.credentials import HidingFormatter
from radlads.tasks.contracts.requests.openmose import OpenMoseExport, OpenMoseImport
from radlads.tasks.jobs.exit_reasons import EXIT_CODES, Preempted, explain, write_ending
from radlads.tasks.jobs.origin import write_origin
from radlads.tasks.jobs.process_group import follow_launcher, quiet_libraries
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher, resolve_teacher_path

logger = logging.getLogger("radlads")


def perform(request: OpenMoseImport | OpenMoseExport) -> None:
    """Make the folder `request.out` atomically; the whole model is held in memory. Raises UserError."""
    out = Path(request.out)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        if isinstance(request, OpenMoseImport):
            _import(request, partial)
        else:
            export_openmose(load_student(request.student), partial, marker=request.marker)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    follow_launcher()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HidingFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    quiet_libraries()
    path = Path(sys.argv[1])
    kinds: TypeAdapter[OpenMoseImport | OpenMoseExport] = TypeAdapter(OpenMoseImport | OpenMoseExport)
    reason: ExitReason = "done"
    message = ""
    try:
        perform(kinds.validate_json(path.read_bytes()))
    except (Exception, Preempted, KeyboardInterrupt) as error:  # outermost handler: every exit is recorded
        reason, message = explain(error, path.parent)
        if reason == "crash":
            logger.exception("the conversion failed")
    write_ending(path.parent, 0, reason, message)
    sys.exit(EXIT_CODES[reason])


if __name__ == "__main__":
    main()
