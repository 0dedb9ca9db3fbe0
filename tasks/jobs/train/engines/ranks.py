"""DeepSpeed's launcher of ranks (`deepspeed.launcher.launch`) as a program that starts in less than half the time.

The launcher's module imports all of DeepSpeed, which takes longer than the launcher needs and holds up every rank.
"""

from __future__ import annotations

import importlib

from radlads.tasks.jobs.train.engines.deepspeed_import import import_deepspeed


def main() -> None:
    """Start the ranks and wait for them, with the command line of `deepspeed.launcher.launch`."""
    import_deepspeed()
    importlib.import_module("deepspeed.launcher.launch").main()


if __name__ == "__main__":
    main()
