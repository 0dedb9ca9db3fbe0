"""The flow that the drill kills: every stage of a recipe, without the orchestrator.

    python benchmarks/drill_flow.py RECIPE RUN STORE WORK

The store's endpoint and credentials come from the environment, as for `radlads run`.
"""

from __future__ import annotations

import logging
import sys

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.store.open import StoreError
from radlads.tasks.graph import convert
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.plain_runner import PlainRunner

logger = logging.getLogger("drill")


def main() -> int:
    """Exit codes: 0 done, 2 an error that the user has to fix, 3 to be retried."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    recipe, run, store, work = sys.argv[1:]
    try:
        with open_pipeline(recipe, run=run, run_id=run, store=store, work=work, tracking="none") as pipeline:
            convert(pipeline.recipe, PlainRunner(pipeline))
    except UserError as error:
        logger.error("%s", error)
        return 2
    except (JobCrashed, StoreError) as error:
        logger.error("%s", error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
