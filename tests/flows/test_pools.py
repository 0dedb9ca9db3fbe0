"""The templates of work pools are what their workers and engines take: rendered by Prefect, checked by the schemas."""

import asyncio
import json
from pathlib import Path

import pytest
import yaml
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values
from prefect.workers.process import ProcessJobConfiguration

POOLS = Path(__file__).resolve().parent.parent.parent / "deployments" / "pools"
KINDS = ["docker", "kubernetes", "slurm"]
GIVEN = {"slurm": {"home": "/shared/radlads", "working_dir": "/shared"}}


def template(kind):
    return json.loads((POOLS / f"{kind}.json").read_text())


def defaults(kind):
    known = template(kind)["variables"]["properties"]
    return {name: one["default"] for name, one in known.items() if "default" in one} | GIVEN.get(kind, {})


def rendered(kind, **values):
    """As the worker does it."""
    return apply_values(template(kind)["job_configuration"], defaults(kind) | values)


@pytest.mark.parametrize("kind", KINDS)
def test_every_variable_is_described_used_and_valid(kind):
    parts = template(kind)
    used = json.dumps(parts["job_configuration"])
    for name, one in parts["variables"]["properties"].items():
        assert one["description"], name
        assert f"{{{{ {name} }}}}" in used, name
    assert validate(defaults(kind), parts["variables"]) == []
    assert validate({**defaults(kind), "tracking": "http://me:secret@mlflow:5000"}, parts["variables"])
    assert validate({**defaults(kind), "command": "touch /tmp/x"}, parts["variables"]), "a run brings no command"
    assert validate({**defaults(kind), "env": {"PYTHONPATH": "/tmp"}}, parts["variables"])


def test_the_deployments_give_their_pools_what_they_ask_for():
    for one in yaml.safe_load((POOLS / "prefect.yaml").read_text())["deployments"]:
        pool = one["work_pool"]
        kind = pool["name"].removeprefix("radlads-")
        assert kind == one["name"]
        schema = template(kind)["variables"]
        given = {key: str(value).replace("{{ $HOME }}", "/home/me").replace("{{ $PWD }}", "/work") if kind == "slurm"
                 else value for key, value in pool["job_variables"].items()}  # fmt: skip
        assert validate(defaults(kind) | given, schema) == []


@pytest.mark.usefixtures("prefect_server")
def test_slurm_is_a_process_on_the_login_node():
    made = asyncio.run(ProcessJobConfiguration.from_template_and_values(template("slurm"), defaults("slurm")))
    assert made.env["RADLADS_HOME"] == "/shared/radlads"
    assert "RADLADS_STORE" not in made.env or made.env["RADLADS_STORE"]
    assert str(made.working_dir) == "/shared"


def test_the_pod_is_what_kubernetes_takes():
    checker = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    manifest = rendered("kubernetes", gpus=8, node_selector={"gpu": "h100"})["job_manifest"]
    manifest["spec"]["template"]["spec"]["containers"][0]["args"] = ["prefect", "flow-run", "execute"]
    for version in ("1.28", checker.latest_version()):
        checker.validate(manifest, version, strict=True)
    pod = manifest["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["/usr/bin/env"], "the image's own entrypoint is radlads"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert pod["securityContext"]["runAsNonRoot"]
    wrong = json.loads(json.dumps(manifest))
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(checker.ValidationError):
        checker.validate(wrong, "1.28", strict=True)


@pytest.mark.usefixtures("prefect_server")
def test_the_worker_of_kubernetes_takes_the_template():
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="pip install prefect-kubernetes")
    kind = worker.KubernetesWorkerJobConfiguration
    made = asyncio.run(kind.from_template_and_values(template("kubernetes"), defaults("kubernetes")))
    made._populate_env_in_manifest()
    container = made.job_manifest["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "RADLADS_STORE", "value": "/radlads/store"} in container["env"]
    assert made.pod_watch_timeout_seconds == 1800


@pytest.mark.usefixtures("prefect_server")
def test_the_worker_of_docker_takes_the_template():
    worker = pytest.importorskip("prefect_docker.worker", reason="pip install prefect-docker")
    from docker.models.containers import _create_container_args

    kind = worker.DockerWorkerJobConfiguration
    values = defaults("docker") | {"gpus": 2, "memory": "200g"}
    made = asyncio.run(kind.from_template_and_values(template("docker"), values))
    assert made.mem_limit == "200g"
    asked = {**made.container_create_kwargs, "image": made.image, "volumes": made.volumes, "version": "1.44",
             "mem_limit": made.mem_limit, "environment": made.env}  # fmt: skip
    sent = _create_container_args(asked)
    host = sent["host_config"]
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 2, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert host["ShmSize"] == 16 << 30
    assert host["Memory"] == 200 << 30
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["Binds"] == ["radlads:/radlads"]
    assert sent["user"] == "1000:1000"
    assert sent["entrypoint"] == ["/usr/bin/env"], "the image's own is radlads"
    assert sent["environment"]["RADLADS_STORE"] == "/radlads/store"
