"""Two real ranks write and read a checkpoint, at every ZeRO stage and without: what follows is equal, bit for bit."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef
from radlads.tasks.jobs.checkpoints import checkpoint as checkpoint_module
from radlads.tasks.jobs.checkpoints.checkpoint import Checkpoints
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.process_group import join_group
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.engines.replicated_engine import ReplicatedEngine

CPU = torch.device("cpu")
CASES = {  # name → precision, ZeRO stage, offloaded
    "zero0": (torch.float32, 0, False),
    "zero1": (torch.float32, 1, False),
    "zero2": (torch.float32, 2, False),
    "zero2-bf16": (torch.bfloat16, 2, False),
    "offload-bf16": (torch.bfloat16, 2, True),
    "replicated-bf16": (torch.bfloat16, "replicated", False),
}
RATES = {"mixer": 0.0, "rest": 1e-2}


def checkpoints_of(folder: Path, case: str, rank: int, ranks: int) -> tuple[Engine, Checkpoints]:
    """A fresh engine, and the checkpoints of a job in `folder`."""
    from test_engine import SECTION, Toy  # this file also runs as a program

    dtype, stage, offload = CASES[case]
    kind, more = Engine, {"zero_stage": stage, "offload": offload}
    if stage == "replicated":
        kind, more = ReplicatedEngine, {}
    engine = kind(Toy().to(dtype), SECTION, device=CPU, dtype=dtype, micro_batch=2, num_micro=2 // ranks, **more)
    store = StoreRef(uri=str(folder / "store"))
    spec = JobSpec(
        stage="distill", run="test", recipe="tiny", digest="d" * 64, spec={}, store=store,
        output_uri=f"{store.uri}/{case}", resources=JobResources(device="cpu", processes=ranks, threads=1),
        scratch=str(folder / f"scratch-{ranks}"),
    )  # fmt: skip
    return engine, Checkpoints(Job(spec=spec, rank=rank, local_rank=rank, world_size=ranks), engine, seed=1, keep=2)


def train(engine: Engine, steps: range, rank: int, ranks: int) -> list[float]:
    """Loss, norm and a random number of every step."""
    from test_engine import batches

    numbers = []
    for step in steps:
        seen = engine.step(batches(step)[rank::ranks], RATES, step + 1, stop=False)
        numbers += [seen.metrics["loss"], seen.grad_norm, torch.rand(()).item()]
    return numbers


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Everything, on every rank: <kind>/<name> → the flattened tensor."""
    names, kinds = engine.parameters.items(), ("param", "exp_avg", "exp_avg_sq")
    whole = {f"{kind}/{name}": torch.zeros(parameter.numel()) for name, parameter in names for kind in kinds}
    for one in engine.own_state():
        for kind, tensor in one.tensors.items():
            whole[f"{kind}/{one.name}"][one.start : one.start + one.numel] = tensor
    for tensor in whole.values():
        torch.distributed.all_reduce(tensor)
    return whole


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def one_rank(folder: Path, rank: int, ranks: int) -> None:
    """In every case: continue what one process began; stop, and continue that in a fresh engine."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "group"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    checkpoint_module.FILE_ELEMENTS = 300
    for case in CASES:
        engine, checkpoints = checkpoints_of(folder, case, rank, ranks)
        with checkpoints:
            assert checkpoints.restore() == 2, case
            assert equal(state_of(engine), load_file(folder / f"{case}-2.safetensors")), case
            train(engine, range(2, 4), rank, ranks)
            checkpoints.save(4)
            expected = train(engine, range(4, 6), rank, ranks)
        fresh, again = checkpoints_of(folder, case, rank, ranks)
        with again:
            assert again.restore() == 4, case
            state = state_of(fresh)
            assert train(fresh, range(4, 6), rank, ranks) == expected, case
            assert equal(state_of(fresh), state_of(engine)), case
        if rank == 0:
            save_file(state, folder / f"{case}-4.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(job_python, tmp_path_factory) -> Path:
    """What two ranks made of checkpoints that one process wrote after two steps."""
    folder = tmp_path_factory.mktemp("ranks")
    join_group(CPU, 0, 1)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(Path(__file__).parent))
    for case in CASES:
        engine, checkpoints = checkpoints_of(folder, case, 0, 1)
        with checkpoints:
            train(engine, range(2), 0, 1)
            checkpoints.save(2)
        save_file(state_of(engine), folder / f"{case}-2.safetensors")
    ranks = [job_python.start(__file__, str(folder), str(rank), "2") for rank in range(2)]
    codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], [rank.output for rank in ranks]
    yield folder
    patch.undo()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reader", CASES)
def test_one_process_continues_what_two_wrote(by_two, case, reader, monkeypatch):
    """And two have continued, in the same state, what one wrote, and what they wrote themselves: see one_rank."""
    monkeypatch.setitem(CASES, case, CASES[reader])
    engine, checkpoints = checkpoints_of(by_two, case, 0, 1)
    assert checkpoints.restore() == 4
    assert equal(state_of(engine), load_file(by_two / f"{case}-4.safetensors"))
    dtype = CASES[reader][0]
    masters = {one.name: one.tensors["param"] for one in engine.held_state()}
    assert all(torch.equal(p.flatten(), masters[name].to(dtype)) for name, p in engine.parameters.items())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    one_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
