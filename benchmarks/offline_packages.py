"""Pack the Python packages of jobs, GPU tests and benchmarks for a machine that reaches no package index.

    python benchmarks/offline_packages.py --python 3.12 --have torch triton numpy scipy pandas pyarrow --out site.tar.xz

Run it where the project is installed and an index can be reached: it takes the versions that are installed there, and
everything that they require, except what --have says the other machine has. On that machine, in the project's folder:

    mkdir -p /tmp/site /tmp/space && tar -xJf site.tar.xz -C /tmp/site && ln -sfn "$PWD" /tmp/space/radlads
    echo 'import sys; sys.path[:0] = ["/tmp/space", "/tmp/site"]' > \\
        "$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/000_radlads.pth"

A `.pth` file and not PYTHONPATH, which jobs do not inherit. Linux on x86-64.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

logger = logging.getLogger("offline_packages")

ROOTS = (
    "accelerate", "boto3", "datasets", "deepspeed", "fastapi", "fla-core", "gguf", "hypothesis", "liger-kernel",
    "lm-eval", "matplotlib", "numpy", "psutil", "pydantic", "pytest", "pytest-timeout", "pytest-xdist", "pyyaml",
    "rich", "safetensors", "tokenizers", "torch", "torchao", "transformers", "typer", "uvicorn",
)  # fmt: skip
_LEFT_OUT = frozenset({"hf-xet"})  # downloads from the hub
_GLIBC = range(39, 4, -1)
_KEPT_SERVICES = frozenset({"s3", "sso", "sso-oidc", "signin", "sts"})
"""botocore describes every service of AWS, in 150 MB; these are asked."""
_KEPT_TASKS = frozenset(
    {"arc", "commonsense_qa", "gsm8k", "hellaswag", "lambada", "mmlu", "openbookqa", "piqa", "super_glue", "wikitext"}
    | {"winogrande"}
)
"""Folders of harness tasks; the others are 70 MB."""


def required(roots: Iterable[str], have: Iterable[str], python: str) -> dict[str, str]:
    """Distribution → its installed version, for the roots and all that they require, without `have` and what only
    that needs."""
    known = {canonicalize_name(name) for name in (*have, *_LEFT_OUT)}
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found: dict[str, str] = {}
    waiting = [Requirement(root) for root in roots]
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if name in known or (name in found and not asked.extras):
            continue
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            logger.warning("%s is not installed here, and left out", name)
            continue
        found[name] = installed.version
        for line in installed.requires or ():
            one = Requirement(line)
            if any(one.marker is None or one.marker.evaluate(environment | {"extra": e}) for e in ("", *asked.extras)):
                waiting.append(one)
    return dict(sorted(found.items()))


def fetch(packages: dict[str, str], python: str, site: Path) -> None:
    """Install the packages for another Python into a folder; what has no wheel is built here."""
    pip = [sys.executable, "-m", "pip"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + [
        "manylinux2014_x86_64",
        "manylinux1_x86_64",
        "any",
    ]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    target += [option for platform in platforms for option in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as folder:
        for name, version in packages.items():
            asked = f"{name}=={version}"
            wheel = [*pip, "download", "-q", "--no-deps", "-d", folder, *target, asked]
            if subprocess.run(wheel, capture_output=True, check=False).returncode != 0:
                build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, asked]
                subprocess.run(build, env=os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}, check=True)
            logger.info("%s", asked)
        wheels = sorted(map(str, Path(folder).glob("*.whl")))
        subprocess.run(
            [*pip, "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *target, *wheels],
            check=True,
        )


def prune(site: Path) -> None:
    """Remove what neither jobs nor tests here read."""
    for folder, kept in ((site / "botocore" / "data", _KEPT_SERVICES), (site / "lm_eval" / "tasks", _KEPT_TASKS)):
        for one in folder.iterdir() if folder.is_dir() else ():
            if one.is_dir() and one.name not in kept:
                shutil.rmtree(one)
    for one in [*site.rglob("tests"), *site.rglob("__pycache__")]:
        if one.is_dir():
            shutil.rmtree(one, ignore_errors=True)
    for one in (site / "torchao").glob("*.so"):
        one.unlink()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="there")
    parser.add_argument("--have", nargs="*", default=["torch", "triton"], metavar="NAME", help="what is there already")
    parser.add_argument("--out", type=Path, default=Path("site.tar.xz"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        site.mkdir()
        fetch(required(ROOTS, options.have, options.python), options.python, site)
        prune(site)
        packed = ["tar", "-C", str(site), "-cf", "-", "."]
        with options.out.open("wb") as out, subprocess.Popen(packed, stdout=subprocess.PIPE) as tar:
            subprocess.run(["xz", "-T0", "-4"], stdin=tar.stdout, stdout=out, check=True)
    logger.info("%s: %.1f MB", options.out, options.out.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
