"""deployments/containers: images and a Compose project. There need be no Docker: the project's commands run as
processes of this machine, and Compose itself reads the project where it is installed."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import tomllib

import mlflow.environment_variables
import pytest
from composed import FOLDER, ROOT, SECRETS, project, stages, variables
from prefect.cli._app import _app as prefect_commands
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names

from radlads.flows.serve import parser as serve_parser
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.settings import services_password

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TARGETS = ("cpu", "cuda", "s3")
# Read by libraries and the shell, each with who reads it.
OF_OTHERS = {
    "AWS_ACCESS_KEY_ID": "botocore",
    "AWS_SECRET_ACCESS_KEY": "botocore",
    "DO_NOT_TRACK": "Prefect and others",
    "HF_HOME": "huggingface_hub",
    "HF_TOKEN": "huggingface_hub",
    "HOME": "the system",
    "NVIDIA_DRIVER_CAPABILITIES": "NVIDIA's container runtime",
    "PATH": "the system",
    "PWD": "prefect.yaml",
    "PYTHONDONTWRITEBYTECODE": "Python",
    "PYTHONUNBUFFERED": "Python",
    "RCLONE_AUTH_KEY": "rclone serve s3 --auth-key",
    "TORCHINDUCTOR_CACHE_DIR": "torch",
    "TRITON_CACHE_DIR": "Triton",
}


def services():
    return project()["services"]


# The project


def test_images_are_of_this_version_built_here_and_never_pulled():
    built = set()
    for name, service in services().items():
        image, _, tag = service["image"].partition(":")
        version, _, target = tag.rpartition("-")
        assert (image, version) == ("radlads", VERSION), name
        assert service["pull_policy"] == "never", "Docker's hub may have an image of this name"
        if "build" in service:
            assert service["build"]["target"] == target
            assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).samefile(
                FOLDER / "Dockerfile"
            )
            built.add(target)
    assert built == set(TARGETS) <= stages().keys()
    pools = "".join(path.read_text() for path in (ROOT / "deployments" / "pools").iterdir())
    assert set(re.findall(r"radlads:([\w.-]+)", pools)) == {f"{VERSION}-cuda"}


@pytest.mark.parametrize("name", services())
def test_a_service_has_no_rights_and_is_reached_on_loopback_alone(name):
    service = services()[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "cap_add", "user", "pid", "ipc"} & service.keys()
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    kept = [volume for volume in service.get("volumes", []) if isinstance(volume, str)]
    assert {volume.partition(":")[0] for volume in kept} <= project()["volumes"].keys()
    assert all("docker.sock" not in json.dumps(volume) for volume in service.get("volumes", []))
    for other, how in service.get("depends_on", {}).items():
        ends = services()[other]["restart"] == "no"
        assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy")
        assert ends or "healthcheck" in services()[other] or stages()[other].all("HEALTHCHECK")


def test_a_worker_with_gpus_comes_only_when_it_is_asked_for():
    by_profile = {tuple(service.get("profiles", [])): name for name, service in services().items()}
    assert by_profile[("gpu",)] == "worker-gpu"
    assert by_profile[("cpu",)] == "worker"
    asked = [name for name, service in services().items() if "deploy" in service]
    assert asked == ["worker-gpu"]
    [device] = services()["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert services()["worker-gpu"]["environment"] == services()["worker"]["environment"]


def test_every_variable_is_one_that_something_reads():
    code = "".join(path.read_text() for top in ("flows", "tasks", "deployments") for path in (ROOT / top).rglob("*.py"))
    ours = set(re.findall(r"RADLADS_[A-Z0-9_]+", code))
    prefects = _get_valid_setting_names(Settings)
    given = {name for service in services().values() for name in service.get("environment", {})}
    given |= {pair.partition("=")[0] for stage in stages().values() for env in stage.all("ENV") for pair in env.split()}
    assert len(given) > 15
    for name in given - OF_OTHERS.keys():
        read = ours if name.startswith("RADLADS_") else prefects if name.startswith("PREFECT_") else ()
        assert name in read or hasattr(mlflow.environment_variables, name), name
    assert "MLFLOW_DISABLE_TELEMETRY" in given


def test_the_example_names_every_variable_and_has_no_secret():
    example = dict(re.findall(r"^#?([A-Z0-9_]+)=(.*)$", (FOLDER / ".env.example").read_text(), re.M))
    assert example.keys() == variables()
    assert example["RADLADS_SERVICES_PASSWORD"] == "radlads:"
    assert example["S3_SECRET_KEY"] == example["HF_TOKEN"] == ""
    with pytest.raises(KeyError, match="S3_SECRET_KEY"):
        project({**SECRETS, "S3_SECRET_KEY": ""})
    with pytest.raises(UserError):
        services_password(example)
    ignored = ["git", "check-ignore", "--quiet", str(FOLDER / ".env")]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode in (0, 128), "128: no repository"


def test_another_store_leaves_the_server_of_s3_out():
    other = project({**SECRETS, "STORE": "s3://bucket/prefix", "S3_ENDPOINT": ""})["services"]["worker"]["environment"]
    assert (other["RADLADS_STORE"], other["RADLADS_S3_ENDPOINT"]) == ("s3://bucket/prefix", "")


def commands():
    """Service → the commands that it runs, as words."""
    for name, service in services().items():
        words = [*service.get("entrypoint", []), *service.get("command", [])]
        if words[:2] == ["/bin/sh", "-euc"]:
            yield from ((name, line.split()) for line in words[2].splitlines())
        elif words:
            yield name, words


def test_every_command_exists():
    seen = set()
    for name, words in commands():
        if words[0] == "prefect":
            rest = [word for word in words[1:] if word != "--no-prompt"]  # an option of the program, not of a command
            prefect_commands.parse_args(rest, exit_on_error=False, print_error=False)
        elif words[:3] == ["python", "-m", "radlads.flows.serve"]:
            asked = serve_parser().parse_args(words[3:])
            assert asked.server == asked.network == name, "others ask for it by the name of the service"
            assert f"127.0.0.1:{asked.port}:{asked.port}" in services()[name]["ports"]
            assert asked.page == f"http://127.0.0.1:{asked.port}"
        else:
            assert words == ["python", "-m", "radlads.deployments.bootstrap"]
        seen.add(name)
    assert seen == {"prefect", "mlflow", "bootstrap", "worker", "worker-gpu"}


def test_compose_takes_the_project(tmp_path):
    docker = shutil.which("docker-compose")
    if (
        docker is None
        or "v1." in subprocess.run([docker, "version"], capture_output=True, text=True, check=False).stdout
    ):
        pytest.skip("docker-compose 2 is not installed")
    env = tmp_path / "env"
    env.write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    asked = [
        docker,
        "--file",
        str(FOLDER / "compose.yaml"),
        "--profile",
        "cpu",
        "--profile",
        "gpu",
        "config",
        "--format",
        "json",
    ]
    done = subprocess.run([*asked[:1], "--env-file", str(env), *asked[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["services"]
    assert made.keys() == services().keys()
    for name, service in services().items():
        assert made[name].get("environment") == service.get("environment"), name
        assert made[name].get("command") == service.get("command"), name


# The images


def test_bases_are_pinned_and_users_are_not_root():
    for name, stage in stages().items():
        assert stage.parent in stages() or re.fullmatch(r"[\w./]+:\d+\.\d+\.\d+-[\w.-]+", stage.parent), name
        assert "latest" not in stage.parent
    for name in TARGETS:
        stage = stages()[name]
        assert stage.all("USER")[-1] == "1000:1000"
        assert stage.all("VOLUME") == ["/data"]
        kinds = [kind for kind, _ in stage.instructions]
        assert "RUN" not in kinds[kinds.index("USER") :], "the user cannot write outside /data"
    for name in ("cpu", "cuda"):
        assert stages()[name].all("ENTRYPOINT") == ['["radlads"]']
        assert any("RADLADS_HOME=/data" in env for env in stages()[name].all("ENV"))


def test_packages_are_those_that_were_tested_and_leave_no_cache():
    installs = [part for stage in stages().values() for run in stage.all("RUN") for part in re.split(r"&&|\|\|", run)]
    installs = [part for part in installs if "pip install" in part or "apt-get install" in part]
    assert len(installs) == 7
    for part in installs:
        if "pip install" in part:
            assert "--no-cache-dir" in part
            assert "constraints.txt" in part
        else:
            assert "--no-install-recommends" in part
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for asked in re.findall(r"'\.\[([\w,]+)\]'", " ".join(installs)):
        assert set(asked.split(",")) <= extras.keys()
    text = (FOLDER / "Dockerfile").read_text()
    assert text.count("apt-get update") == text.count("rm -rf /var/lib/apt/lists/*")


def test_no_host_is_named_but_those_of_the_project():
    for path in FOLDER.iterdir():
        hosts = set(re.findall(r"https?://(?:[^@/\s]*@)?([\w.-]+)", path.read_text()))
        assert hosts <= {"127.0.0.1", *services()}, path


def test_the_gpu_libraries_stay_out_of_the_image_for_cpus():
    [run] = [run for run in stages()["cpu-build"].all("RUN") if "pip install" in run]
    first, second = (part for part in run.split("&&") if "pip install" in part)
    assert '--no-deps --index-url "${TORCH_INDEX}"' in first
    assert first.split()[-1] == "torch"
    assert "--index-url" not in second
    assert "TORCH_INDEX" in stages()["cpu-build"].all("ARG"), "no default"
    found = re.search(r"grep -E '([^']+)'", run)
    assert found is not None
    for package in ("nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "cuda-toolkit"):
        assert re.search(found[1], package), package
    assert not re.search(found[1], "nvidia-ml-py"), "DeepSpeed wants it, and it has no libraries"


def test_what_is_copied_reaches_the_builder():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {word.rstrip("/") for stage in stages().values() for copy in stage.all("COPY") if "--from" not in copy
              for word in copy.split()[:-1]}  # fmt: skip
    assert copied == {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    listed = {
        name.split(".")[1]
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    }
    assert listed <= copied
    assert any(
        fnmatch.fnmatch("deployments/containers/.env", rule) or rule == "deployments/containers" for rule in rules
    )


# What the servers ask for in a network


@pytest.mark.parametrize(
    "text", ["", "radlads:", "radlads:short", "0123456789abcdefghij", "radlads:with@sign0123456789"]
)
def test_a_network_is_served_with_a_good_password_only(text):
    with pytest.raises(UserError, match="RADLADS_SERVICES_PASSWORD") as caught:
        services_password({"RADLADS_SERVICES_PASSWORD": text})
    assert text == "" or text not in str(caught.value)
    good = SECRETS["RADLADS_SERVICES_PASSWORD"]
    assert services_password({"RADLADS_SERVICES_PASSWORD": good}) == good
    assert good not in hide(f"the password is {good}")
