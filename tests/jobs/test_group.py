"""Ranks meet where other machines cannot reach them."""

import base64
import json
import os
import socket
import sys

import pytest

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.jobs.train.engines.ranks import WaitingRanks
from radlads.tasks.launchers.local import job_environment

RANK = """
import json, os, sys
import psutil, torch
from torch import distributed
from radlads.tasks.jobs.process_group import join_group, leave_group
rank = int(os.environ["RANK"])
join_group(torch.device("cpu"), rank, 2)
numbers = torch.tensor([rank + 1.0])
distributed.all_reduce(numbers)
listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
sys.stdout.write(json.dumps({"sum": numbers.item(), "listening": listening}) + "\\n")
sys.stdout.flush()
distributed.barrier()
leave_group(orderly=True)
"""


def test_two_ranks_listen_on_loopback_alone(job_python):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = job_environment(os.environ, JobResources(device="cpu", processes=2, threads=1)) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [job_python.start("-c", RANK, env=env | {"RANK": str(rank)}) for rank in range(2)]
    for rank in ranks:
        assert rank.wait() == 0, rank.output
        [told] = [json.loads(line) for line in rank.output.splitlines() if line.startswith("{")]
        assert told["sum"] == 3
        assert set(told["listening"]) == {"127.0.0.1"}


def test_ranks_start_before_their_launcher_knows_their_environment(tmp_path):
    program = tmp_path / "rank.py"
    told = "RANK LOCAL_RANK MASTER_PORT RADLADS_RANK_PIPE"
    program.write_text(
        "import os, sys\n"
        "from radlads.tasks.jobs.process_group import follow_launcher\n"
        "follow_launcher()\n"
        f"open(sys.argv[1] + os.environ['RANK'], 'w').write(str([os.environ.get(n) for n in '{told}'.split()]))\n"
    )
    hosts = base64.urlsafe_b64encode(b'{"a": ["0"], "b": ["0", "1"]}').decode()
    command = [str(program), str(tmp_path / "rank-")]
    ranks = WaitingRanks(["--no_local_rank", f"--world_info={hosts}", "--node_rank=1", *command])
    command = [sys.executable, "-u", *command]
    with pytest.raises(RuntimeError, match="wants to run"):
        ranks.Popen(["other"], {})
    first = ranks.Popen(command, {"RANK": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"})
    assert first.wait(60) == 0
    assert (tmp_path / "rank-1").read_text() == "['1', '0', '29500', None]"

    (second, writer), *more = ranks._waiting
    assert not more
    os.close(writer)  # as when the launcher dies
    assert second.wait(60) == 1
    assert not (tmp_path / "rank-2").exists()


def test_a_rank_that_died_before_it_was_told_has_its_exit_code(tmp_path):
    program = tmp_path / "rank.py"
    program.write_text("raise SystemExit(7)")
    hosts = base64.urlsafe_b64encode(b'{"a": ["0"]}').decode()
    ranks = WaitingRanks([f"--world_info={hosts}", str(program)])
    assert ranks._waiting[0][0].wait(60) == 7
    assert ranks.Popen([sys.executable, "-u", str(program)], {"RANK": "0"}).poll() == 7
