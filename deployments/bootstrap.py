"""Makes what the deployments need in Prefect: `python -m radlads.deployments.bootstrap`. Safe to run again.

A process work pool `radlads`, the global concurrency limit `radlads-gpu`, which a job on a GPU holds so that two
pipeline runs do not share it, and an automation that marks runs whose process is gone (zombies.py). What is there
already, a limit that somebody raised for one, is left as it is.
"""

from __future__ import annotations

import logging

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.workers.process import ProcessWorker

from radlads.deployments.zombies import ask_after_runs, make_automation

_log = logging.getLogger(__name__)
WORK_POOL = "radlads"
GPU_LIMIT = "radlads-gpu"


def bootstrap(gpu_slots: int = 1) -> list[str]:
    """Make what is missing; what that was. gpu_slots: jobs that may use this machine's GPUs at once."""
    with get_client(sync_client=True) as client:
        made = [*_make_work_pool(client), *_make_gpu_limit(client, gpu_slots), *make_automation(client)]
        ask_after_runs(client)
        return made


def _make_work_pool(client: SyncPrefectClient) -> list[str]:
    try:
        client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        try:
            client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template))
        except ObjectAlreadyExists:
            return []
        return [f"work pool {WORK_POOL}"]
    return []


def _make_gpu_limit(client: SyncPrefectClient, slots: int) -> list[str]:
    try:
        client.read_global_concurrency_limit_by_name(GPU_LIMIT)
    except ObjectNotFound:
        try:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=slots))
        except ObjectAlreadyExists:  # made by somebody else since, or by a request that was sent twice
            return []
        return [f"concurrency limit {GPU_LIMIT}"]
    return []


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made = bootstrap()
    _log.info("made: %s", ", ".join(made) if made else "nothing, all is there")
