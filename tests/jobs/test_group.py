"""Ranks meet where other machines cannot reach them."""

import json
import os
import socket

from radlads.tasks.contracts.job import JobResources
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
