"""prefect.yaml names flows that exist, and bootstrap may run any number of times."""

import importlib
import json
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.flows import Flow
from prefect.workers.process import ProcessWorker

from radlads.deployments.bootstrap import GPU_LIMIT, JOB_TEMPLATE, WORK_POOL, bootstrap
from radlads.deployments.zombies import AUTOMATION
from radlads.tasks.contracts.settings import resolve_settings

PREFECT_YAML = Path(__file__).resolve().parent.parent.parent / "prefect.yaml"


def deployments():
    return yaml.safe_load(PREFECT_YAML.read_text())["deployments"]


def test_names():
    names = set()
    for deployment in deployments():
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        assert isinstance(flow, Flow)
        assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties)
        assert deployment["work_pool"]["name"] == WORK_POOL
        names.add(f"{flow.name}/{deployment['name']}")
    assert names == {"radlads/full", "radlads/smoke", "radlads-evaluate/evaluate", "radlads-pretrain/pretrain"}


def test_nothing_is_pulled():
    assert yaml.safe_load(PREFECT_YAML.read_text())["pull"] == []


@pytest.mark.usefixtures("prefect_server")
def test_bootstrap_is_idempotent(monkeypatch, tmp_path):
    assert bootstrap() == [f"work pool {WORK_POOL}", f"concurrency limit {GPU_LIMIT}", f"automation {AUTOMATION}"]
    with get_client(sync_client=True) as client:
        assert client.read_work_pool(WORK_POOL).type == "process"
        limit = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        assert limit.limit == 1
        client._client.patch(f"/v2/concurrency_limits/{limit.id}", content=json.dumps({"limit": 3}))
        assert bootstrap() == []
        assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit == 3
        open_to_commands = WorkPoolUpdate(base_job_template=ProcessWorker.get_default_base_job_template())
        client.update_work_pool(WORK_POOL, open_to_commands)
        assert bootstrap() == [f"template of the work pool {WORK_POOL}"]
        assert client.read_work_pool(WORK_POOL).base_job_template == JOB_TEMPLATE
    monkeypatch.chdir(tmp_path)
    assert resolve_settings().gpu_limit == GPU_LIMIT
