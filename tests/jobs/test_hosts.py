"""Jobs on two machines over ssh: network namespaces with an sshd each, so that their ranks share no loopback.

`make drill` kills ranks, hosts, connections and the flow's machine at random moments; here is one job, and what is
refused before it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, StoreRef
from radlads.tasks.contracts.process_tree import read_proc
from radlads.tasks.contracts.recipe.machines import Host
from radlads.tasks.contracts.recipe.recipe import Rate, Resources, load_recipe
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
from radlads.tasks.contracts.store.open import open_store, store_id
from radlads.tasks.jobs.common import execute
from radlads.tasks.jobs.train import train
from radlads.tasks.launchers.registry import find_launcher
from radlads.tasks.launchers.remote.facts import expected, facts_of, fault_of
from radlads.tasks.launchers.remote.hosts import read_hosts
from radlads.tasks.launchers.remote.papers import Papers, apply
from radlads.tasks.launchers.remote.part import PartEnding, job_ending
from radlads.tasks.launchers.remote.ssh import ssh_command

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import ssh_lab  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))
SETTINGS = {"mixer_rate": Rate(start=3e-3, final=1e-3), "rest_rate": Rate(start=1e-3, final=1e-4)}
NEEDS_LAB = pytest.mark.skipif(bool(ssh_lab.why_not()), reason=str(ssh_lab.why_not()))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with ssh_lab.two_machines(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def on(lab, **more) -> Resources:
    hosts = tuple(f"{machine.name} slots=1" for machine in lab.machines)
    return Resources(launcher="hosts", hosts=hosts, device="cpu", remote={"ssh_config": str(lab.ssh_config)} | more)


@NEEDS_LAB
@pytest.mark.slow
def test_two_hosts_train_as_one_process_does(training, lab):
    short = SETTINGS | {"tokens": 4 * 128, "checkpoint_every": 3}
    alone = training.job("distill", "one-process", **short)
    assert execute(train.main, alone) == "done", training.ending(alone)
    job = training.job("distill", "two-hosts", resources={"processes": 2}, **short | {"micro_batch": 1})
    seen = []
    find_launcher(on(lab)).run(job.spec, on_progress=seen.append, grace_seconds=10)
    assert training.ending(job)["reason"] == "done"
    assert (seen[-1].done, seen[-1].unit) == (4, "steps")
    one, two = training.curve(alone), training.curve(job)
    assert [step for step, _ in two] == [step for step, _ in one] == [1, 2, 3, 4]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    first, second = (machine.name for machine in lab.machines)
    log = (job.scratch / "log.txt").read_text()
    assert f"over ssh on {first} slots=1, {second} slots=1" in log
    assert re.search(rf"^\[{second}\] .*nnodes=2", log, re.MULTILINE)
    assert "INFO distill[0] step 4/4" in log
    assert not list(job.scratch.glob("host-*"))
    assert not any("radlads" in " ".join(command_of(pid)) for machine in lab.machines for pid in machine.pids())


def command_of(pid: int) -> list[str]:
    return read_proc(pid, "cmdline").decode().split("\0")


@NEEDS_LAB
def test_what_is_wrong_with_a_host_is_said_before_a_job_starts(tmp_path, lab):
    store = open_store(StoreRef(uri=str(tmp_path / "store")))  # new: it has no id yet
    good = on(lab)
    find_launcher(good).check(store, tmp_path / "work")

    first = lab.machines[0].name
    nowhere = f"{first}.invalid"
    bad = {
        rf"host {nowhere}: .*(resolve|known).*without a password": on(lab).model_copy(update={"hosts": (nowhere,)}),
        rf"host {first}: /usr/bin/python3: .*radlads.*resources\.remote\.python": on(lab, python="/usr/bin/python3"),
        rf"host {first} cannot write its work folder /proc/x; .*resources\.remote\.work": on(lab, work="/proc/x"),
        rf"host {first} has 0 visible GPU\(s\), the job is to have 1 there": Resources(
            **good.model_dump() | {"device": "cuda", "gpu_memory_gib": 80}
        ),
    }

    def refusal(resources: Resources) -> str:
        one = resources.model_copy(update={"hosts": resources.hosts[:1]})
        with pytest.raises(UserError) as raised:
            find_launcher(one).check(store, tmp_path / "work")
        return str(raised.value)

    with ThreadPoolExecutor() as pool:
        for words, said in zip(bad, pool.map(refusal, bad.values()), strict=True):
            assert re.fullmatch(f"{words}.*", said), said


@NEEDS_LAB
def test_a_gpu_of_a_host_is_held_by_one_job_at_a_time(lab, caplog):
    caplog.set_level("INFO")
    asked = on(lab).model_copy(update={"hosts": (lab.machines[0].name,)})
    gpu = JobResources(device="cuda", processes=1, threads=1)
    entered = threading.Event()

    def second() -> None:
        with find_launcher(asked).hold_devices(gpu, "the second"):
            entered.set()

    waiting = threading.Thread(target=second, daemon=True)
    with find_launcher(asked).hold_devices(gpu, "the first"):
        waiting.start()
        end = time.monotonic() + 30
        while "the second waits for GPU" not in caplog.text:
            assert time.monotonic() < end, caplog.text
            time.sleep(0.05)
        assert "held by the first" in caplog.text
        assert not entered.is_set()
    assert entered.wait(30)
    waiting.join(30)


def test_what_must_agree_between_two_machines(tmp_path):
    store = open_store(StoreRef(uri=str(tmp_path / "store")))
    store_id(store)
    there = facts_of(store.ref, str(tmp_path / "work"), visible="0,1")

    def fault(gpus=2, **changed):
        return fault_of(there | changed, expected(store, gpus, "/w"), there["time"] + 1)

    assert fault() is None
    assert fault(gpus=3) == "has 2 visible GPU(s), the job is to have 3 there"
    assert "another version of radlads" in fault(code="0")
    assert fault(versions=there["versions"] | {"torch": "1.0"}).startswith("has torch 1.0, the flow's machine has ")
    assert "another store lies there; use S3" in fault(store="other")
    assert "nothing lies there; use S3" in fault(store="", why="")
    assert "a clock that is 3,6" in fault(time=there["time"] - 3600)
    assert facts_of(StoreRef(uri=str(tmp_path / "none")), "/proc/x", None)["why"].startswith("there is no store at")
    assert not (tmp_path / "none").exists()


def test_the_first_cause_of_an_end():
    closed = {"reason": "crash", "message": "RuntimeError: Connection closed by peer [10.0.0.2]", "rank": 0}
    killed = PartEnding("b", 247)

    def message(*endings):
        code, record = job_ending(endings)
        assert code
        return record["reason"], record["message"]

    assert job_ending([PartEnding("a", 0, {"reason": "done"}), PartEnding("b", 0)]) == (0, {"reason": "done"})
    reason, text = message(PartEnding("a", 1, closed), killed)
    assert (reason, text[:40]) == ("crash", "on host b: ended with exit code 247 (SIG")
    full = {"reason": "disk-full", "message": "no space", "rank": 3}
    assert message(PartEnding("a", 1, closed), PartEnding("b", 5, full)) == ("disk-full", "on host b: no space")
    lost = PartEnding("b", 1, lost="Timeout, server not responding.")
    assert message(PartEnding("a", 1, closed), lost)[1] == "host b was lost: Timeout, server not responding."
    error = {"reason": "crash", "message": "KeyError: 'x'", "rank": 5}
    assert message(PartEnding("a", 1, closed), PartEnding("b", 1, error))[1] == "on host b: KeyError: 'x'"
    assert message(PartEnding("a", 143, None, asked=True), PartEnding("b", 1, error))[1] == "on host b: KeyError: 'x'"
    stopped = {"reason": "preempted", "message": "stopped on request", "rank": 0}
    assert message(PartEnding("a", 143, stopped, asked=True), PartEnding("b", 143, asked=True))[0] == "preempted"


def test_the_papers_of_a_job_arrive_as_they_are(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    log = there / "log.txt"
    log.write_text("of an earlier attempt\n")
    papers = Papers(there, log, records=True)

    def carry(prefix=""):
        while changes := papers.changes():
            for change in changes:
                apply(here, json.loads(json.dumps(change)), prefix)

    with log.open("ab") as stream:
        stream.write("é\n".encode()[:1])
        stream.flush()
        carry()
        stream.write("é\nü\n".encode()[1:])
    (there / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"torn')
    (there / "progress.json").write_text("{}")
    carry("[b] ")
    assert (here / "log.txt").read_text() == "[b] é\n[b] ü\n"
    assert (here / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (here / "progress.json").read_text() == "{}"
    (there / "new").write_text('{"step": 1}\n')  # as a record is rewound
    (there / "new").replace(there / "metrics.jsonl")
    carry()
    assert (here / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (there / "metrics.jsonl").write_text('{"step": 3}\n' * 9)  # the same inode, and longer
    carry()
    assert (here / "metrics.jsonl").read_text() == '{"step": 3}\n' * 9
    with (there / "metrics.jsonl").open("a") as record:
        record.write('{"step": 4}\n' * 1000)
    carry()
    assert (here / "metrics.jsonl").read_bytes() == (there / "metrics.jsonl").read_bytes()
    assert Papers(there, log, records=False).changes() == []
    apply(here, {"file": "../escape", "text": "x"})
    assert not (tmp_path / "escape").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["-oProxyCommand=x slots=1"], "is not a host"),
        (["a slots=0"], "is not a host"),
        (["a; reboot"], "is not a host"),
        (["a slots=1", "a slots=2"], "the host a is there twice"),
        (["# none", ""], "there is no host"),
    ],
)
def test_hostfiles_that_are_refused(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        Resources(launcher="hosts", hosts=tuple(lines), device="cpu")
    path = tmp_path / "hostfile"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=words):
        find_launcher(Resources(launcher="hosts", hosts=str(path), device="cpu"))


def test_the_resources_are_the_hostfiles(tmp_path):
    (tmp_path / "hostfile").write_text("# two\nworker-1 slots=8\nme@worker-2 slots=4  # half\n")
    asked = Resources(launcher="hosts", hosts=str(tmp_path / "hostfile"), gpu_memory_gib=80)
    assert find_launcher(asked).resources(asked) == JobResources(
        device="cuda", processes=12, threads=1, gpu_memory_gib=80
    )
    with pytest.raises(UserError, match=r"resources\.processes is 8, but the hostfile gives 12"):
        find_launcher(asked).resources(asked.model_copy(update={"processes": 8}))
    with pytest.raises(UserError, match=r"none.*No such file"):
        find_launcher(asked.model_copy(update={"hosts": str(tmp_path / "none")}))
    for wrong in ({"hosts": ("a",)}, {"launcher": "hosts"}, {"launcher": "hosts", "hosts": ("a",)}):
        with pytest.raises(ValueError, match=r"need each other|gpu_memory_gib"):
            Resources(**wrong)
    command = ssh_command(Host("me@worker-2", 4), asked.remote)
    assert command[-3:] == ["--", "me@worker-2", f"{sys.executable} -P -m radlads.tasks.launchers.remote.agent"]


def test_a_hostfile_of_another_editor(tmp_path):
    """Windows' byte-order mark and line ends are no part of a name; what is no text is refused as that."""
    path = tmp_path / "hostfile"
    path.write_bytes("\ufeffone slots=2\r\n# half\r\ntwo slots=1\r\n".encode())
    assert read_hosts(str(path)) == (Host("one", 2), Host("two", 1))
    path.write_bytes(b"\x80\x05slots")
    with pytest.raises(
        UserError, match=r"hostfile: not a text file \(UTF-8\); a line of a hostfile is `name slots=8`$"
    ):
        read_hosts(str(path))


def test_a_machine_without_ssh_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = find_launcher(Resources(launcher="hosts", hosts=("a slots=1",), device="cpu"))
    with pytest.raises(UserError, match=r"^there is no `ssh` on this machine: launcher `hosts` needs it"):
        launcher.check(open_store(StoreRef(uri=str(tmp_path / "store"))), tmp_path)


def test_a_recipe_names_its_hostfile_relative_to_itself(tmp_path):
    (tmp_path / "hostfile").write_text("a")
    recipe = load_recipe(
        "smoke", {"resources.launcher": "hosts", "resources.hosts": "hostfile", "resources.device": "cpu"}
    )
    anchored = anchor_recipe(recipe, str(tmp_path / "r.yaml"), Path("/"))
    assert anchored.resources.hosts == str(tmp_path / "hostfile")
