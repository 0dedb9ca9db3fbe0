"""Creates the Prefect objects that the deployments need: `python -m radlads.deployments.bootstrap`. Safe to repeat.

They are the process work pool `radlads`, which runs only flow runs; the global concurrency limit `radlads-gpu`, which a
job on a GPU holds so that two pipeline runs do not share it; an automation that marks runs whose process has died
(zombies.py); and, if RADLADS_NOTIFY_URL or RADLADS_NOTIFY_BLOCK is set, automations that tell of runs that failed or
wait (notices.py). Existing objects, such as a limit that was raised, are not changed, except that the pool's template
is restored, and that notices go where the variables say now.
"""

from __future__ import annotations

import logging
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from radlads.deployments.notices import make_notices
from radlads.deployments.zombies import ask_after_runs, make_automation
from radlads.tasks.contracts.settings import HEARTBEAT_SECONDS, Notices, resolve_notices

_log = logging.getLogger(__name__)
WORK_POOL = "radlads"
GPU_LIMIT = "radlads-gpu"
# Prefect's own template lets a flow run set a shell command and an environment; this one accepts neither.
JOB_TEMPLATE: dict[str, Any] = {
    "job_configuration": {
        "working_dir": "{{ working_dir }}",
        "stream_output": "{{ stream_output }}",
        # A run that stops sending these is marked as crashed: zombies.py.
        "env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)},
    },
    "variables": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "working_dir": {
                "title": "Working Directory",
                "description": "Folder to which relative paths in a run's parameters refer.",
                "type": "string",
                "pattern": "^/",
            },
            "stream_output": {
                "title": "Stream Output",
                "description": "Whether the worker logs the output of flow runs.",
                "type": "boolean",
                "default": True,
            },
        },
    },
}


def bootstrap(gpu_slots: int = 1, notices: Notices | None = None) -> list[str]:
    """Create missing objects; returns their names. gpu_slots: jobs that may use this machine's GPUs at once. notices:
    None for those of the environment. Raises UserError."""
    told = resolve_notices() if notices is None else notices
    with get_client(sync_client=True) as client:
        made = [*_make_work_pool(client), *_make_gpu_limit(client, gpu_slots), *make_automation(client)]
        made += make_notices(client, told)
        ask_after_runs(client)
        return made


def _make_work_pool(client: SyncPrefectClient) -> list[str]:
    try:
        pool = client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        try:
            client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=JOB_TEMPLATE))
        except ObjectAlreadyExists:
            return []
        return [f"work pool {WORK_POOL}"]
    if pool.base_job_template == JOB_TEMPLATE:
        return []
    client.update_work_pool(WORK_POOL, WorkPoolUpdate(base_job_template=JOB_TEMPLATE))
    return [f"template of the work pool {WORK_POOL}"]


def _make_gpu_limit(client: SyncPrefectClient, slots: int) -> list[str]:
    try:
        client.read_global_concurrency_limit_by_name(GPU_LIMIT)
    except ObjectNotFound:
        try:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=slots))
        except ObjectAlreadyExists:  # created concurrently, or by a request that was sent twice
            return []
        return [f"concurrency limit {GPU_LIMIT}"]
    return []


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made = bootstrap()
    _log.info("created: %s", ", ".join(made) if made else "nothing, all exist")
