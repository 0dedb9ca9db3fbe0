"""Checkpoints in parts: any division of the state over ranks is the same state, and a part that is missing is noticed.

Several ranks live in this process, each as on a machine of its own, with tables of what they hold in place of
DeepSpeed's.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef
from radlads.tasks.contracts.store.open import LocalStore, StoreError
from radlads.tasks.jobs.checkpoints import checkpoint as checkpoint_module
from radlads.tasks.jobs.checkpoints import host_copy, parts
from radlads.tasks.jobs.checkpoints.checkpoint import Checkpoints
from radlads.tasks.jobs.checkpoints.checkpoint_sheet import Checkpoint
from radlads.tasks.jobs.checkpoints.state_slices import ELEMENT_BYTES, KINDS, StateSlice, equal_share, into_files
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.process_group import join_group

from .test_engine import CPU, Toy, batches, make_engine

SHAPES = {name: tuple(parameter.shape) for name, parameter in Toy().student.named_parameters()}
ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES.values())
ENGINES = {"zero0": 0, "zero1": 1, "zero2": 2, "offload": "offload"}
TABLES = {"two shares": (2, "shares"), "two partitions": (2, "partitions"), "three partitions": (3, "partitions")}


class Table:
    """An engine's state on one of several ranks. how: "shares", where every rank holds everything, as without ZeRO; or
    "partitions": two groups of parameters, each flattened, padded and divided."""

    def __init__(self, rank: int, ranks: int, how: str) -> None:
        self.parameters = {name: torch.empty(shape) for name, shape in SHAPES.items()}
        self.rank, self.ranks, self.how = rank, ranks, how
        self.counter = self.settled = 0
        self.flat = {name: dict.fromkeys(KINDS) for name in SHAPES}
        for name, parameter in self.parameters.items():
            self.flat[name] = {kind: torch.full((parameter.numel(),), torch.nan) for kind in KINDS}

    def held_state(self) -> list[StateSlice]:
        whole = [StateSlice(name, 0, tensors) for name, tensors in self.flat.items()]
        if self.how == "shares":
            return whole
        held = []
        for group in (whole[::2], whole[1::2]):
            total = sum(one.numel for one in group)
            size = -(-total // self.ranks)
            begin, place = size * self.rank, 0
            for one in group:
                first, last = max(begin - place, 0), min(begin + size - place, one.numel)
                held += [one.narrow(first, last - first)] if first < last else []
                place += one.numel
        return held

    def own_state(self) -> list[StateSlice]:
        held = self.held_state()
        return equal_share(held, self.rank, self.ranks) if self.how == "shares" else held

    def adam_steps(self) -> int:
        return self.counter

    def set_adam_steps(self, count: int) -> None:
        self.counter = count

    def settle(self) -> None:
        self.settled += 1


def filled(rank: int, ranks: int, how: str, scale: float = 1.0) -> Table:
    """A table whose part of the state is counted up; what it does not hold is NaN."""
    table, place = Table(rank, ranks, how), 0.0
    wanted = whole_state(scale)
    for one in table.held_state():
        for kind in KINDS:
            one.tensors[kind].copy_(wanted[one.name][kind][one.start : one.start + one.numel])
        place += one.numel
    table.counter = 7
    return table


def whole_state(scale: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: {kind: scale * torch.randn(torch.Size(shape).numel(), generator=generator) for kind in KINDS}
        for name, shape in SHAPES.items()
    }


def state_of(engine) -> dict[tuple[str, str], torch.Tensor]:
    """(name, kind) → what a lone rank holds of it."""
    return {(one.name, kind): one.tensors[kind].clone() for one in engine.held_state() for kind in KINDS}


@pytest.fixture(autouse=True)
def one_attempt(monkeypatch) -> None:
    """The ranks of these tests have no group in which to agree on the mark of their files."""
    join_group(CPU, 0, 1)
    monkeypatch.setattr(checkpoint_module, "same_draw", lambda device: "0000000a")


def make_job(root: Path, store: StoreRef, rank: int = 0, ranks: int = 1) -> Job:
    spec = JobSpec(
        stage="distill", run="test", recipe="tiny", digest="d" * 64, spec={}, store=store,
        output_uri=f"{store.uri}/product", resources=JobResources(device="cpu", processes=ranks, threads=1),
        scratch=str(root / f"rank-{rank}-of-{ranks}"),
    )  # fmt: skip
    Path(spec.scratch).mkdir(parents=True, exist_ok=True)
    return Job(spec=spec, rank=rank, local_rank=0, world_size=ranks)


def of_ranks(root: Path, store: StoreRef, engines: list) -> list[Checkpoints]:
    jobs = [make_job(root, store, rank, len(engines)) for rank in range(len(engines))]
    return [Checkpoints(job, engine, seed=1, keep=2) for job, engine in zip(jobs, engines, strict=True)]


def save(root: Path, store: StoreRef, engines: list, step: int) -> None:
    everyone = of_ranks(root, store, engines)
    for one in everyone:
        one.save(step)
    for one in everyone:
        one.wait()


def restore(root: Path, store: StoreRef, engines: list) -> list[int]:
    """What each rank's restore returned; the first rank's choice reaches the others."""
    first, *others = of_ranks(root, store, engines)
    steps = [first.restore()]
    for one in others:
        one.find = lambda latest=None: steps[0]
        steps.append(one.restore())
    return steps


def committed(store: StoreRef) -> list[int]:
    keys = LocalStore(store).list("product/checkpoints")
    return sorted(int(key.split("step-")[1].split("/")[0]) for key in keys if key.endswith("manifest.json"))


def make_engines(kind: str) -> list:
    if kind in ENGINES:
        return [make_engine(Toy(), ENGINES[kind])]
    ranks, how = TABLES[kind]
    return [Table(rank, ranks, how) for rank in range(ranks)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[StoreRef, dict[tuple[str, str], torch.Tensor]]]:
    """Who wrote it → a store with a checkpoint of step 3, and the state in it."""
    join_group(CPU, 0, 1)
    patch = pytest.MonkeyPatch()
    patch.setattr(checkpoint_module, "same_draw", lambda device: "0000000a")
    patch.setattr(checkpoint_module, "FILE_ELEMENTS", 300)  # several files a rank, parameters cut by them
    found = {}
    for kind in (*ENGINES, *TABLES):
        root = tmp_path_factory.mktemp("source")
        ref = StoreRef(uri=str(root / "store"))
        if kind in ENGINES:
            (engine,) = engines = make_engines(kind)
            for step in range(3):
                engine.step(batches(step), {"mixer": 0.0, "rest": 1e-2}, step, stop=False)
            state = state_of(engine)
        else:
            ranks, how = TABLES[kind]
            engines = [filled(rank, ranks, how) for rank in range(ranks)]
            state = {(name, one): tensor for name, of in whole_state().items() for one, tensor in of.items()}
        save(root, ref, engines, 3)
        found[kind] = ref, state
    patch.undo()
    return found


@pytest.fixture(scope="module")
def targets() -> dict[str, list]:
    join_group(CPU, 0, 1)
    return {kind: make_engines(kind) for kind in (*ENGINES, *TABLES)}


@pytest.mark.parametrize("target", [*ENGINES, *TABLES])
@pytest.mark.parametrize("source", [*ENGINES, *TABLES])
def test_whoever_wrote_it_whoever_reads_it_the_state_is_equal(sources, targets, tmp_path, source, target):
    ref, state = sources[source]
    engines = targets[target]
    assert restore(tmp_path, ref, engines) == [3] * len(engines)
    seen = dict.fromkeys(state, 0)
    for engine in engines:
        assert engine.adam_steps() == (3 if source in ENGINES else 7)
        for one in engine.held_state():
            for kind in KINDS:
                assert torch.equal(one.tensors[kind], state[one.name, kind][one.start : one.start + one.numel])
                seen[one.name, kind] += one.numel
        if target in ENGINES:  # what the network computes with follows the masters
            assert all(torch.equal(p.flatten(), state[name, "param"]) for name, p in engine.parameters.items())
        else:
            assert engine.settled > 0
    copies = len(engines) if target == "two shares" else 1
    assert all(count == copies * torch.Size(SHAPES[name]).numel() for (name, _), count in seen.items())


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("how", ["shares", "partitions"])
def test_every_element_is_written_once_and_evenly(ranks, how):
    sizes, seen = [], {name: torch.zeros(torch.Size(shape).numel()) for name, shape in SHAPES.items()}
    for rank in range(ranks):
        files = into_files(filled(rank, ranks, how).own_state(), 100)
        assert all(sum(one.numel for one in file) == 100 for file in files[:-1])
        for one in (one for file in files for one in file):
            seen[one.name][one.start : one.start + one.numel] += 1
        sizes.append(sum(one.numel for file in files for one in file))
    assert all((count == 1).all() for count in seen.values())
    assert max(sizes) - min(sizes) <= (1 if how == "shares" else 2 * ranks)


@pytest.fixture
def ref(tmp_path) -> StoreRef:
    return StoreRef(uri=str(tmp_path / "store"))


def pair(scale: float = 1.0) -> list[Table]:
    return [filled(rank, 2, "partitions", scale) for rank in range(2)]


@pytest.mark.parametrize("moment", ["its files", "its sheet"])
def test_a_rank_that_fails_is_named_and_the_checkpoint_before_stays(ref, tmp_path, monkeypatch, moment):
    save(tmp_path, ref, pair(), 1)
    name = {"its files": "step-000002/state-0000000a0001-00001", "its sheet": "part-"}[moment]
    method = {"its files": "put_blocks", "its sheet": "put_bytes"}[moment]
    original = getattr(LocalStore, method)
    failures = [OSError("the disk is full")]

    def failing(self, key, data):
        if name in key and failures:
            raise failures.pop()
        return original(self, key, data)

    monkeypatch.setattr(LocalStore, method, failing)
    first, second = of_ranks(tmp_path, ref, pair(2.0))
    first.save(2)
    second.save(2)
    with pytest.raises(OSError, match="the disk is full"):
        second.wait()
    with pytest.raises(StoreError, match=r"rank 1 could not write its part .*: OSError: the disk is full"):
        first.save(3)
    assert committed(ref) == [1]
    back = pair(5.0)
    assert restore(tmp_path, ref, back) == [1, 1]
    assert torch.equal(back[0].held_state()[0].tensors["param"], pair()[0].held_state()[0].tensors["param"])


def test_a_rank_that_never_answers_leaves_nothing_committed(ref, tmp_path, monkeypatch):
    save(tmp_path, ref, pair(), 1)
    monkeypatch.setattr(parts, "_PATIENCE_SECONDS", 0.2)
    first, _ = of_ranks(tmp_path, ref, pair(2.0))
    first.save(2)
    with pytest.raises(StoreError, match="rank 1 has not written its part"):
        first.wait()
    assert committed(ref) == [1]


@pytest.mark.parametrize("damage", ["torn", "altered", "missing"])
def test_a_damaged_part_of_one_rank_sends_everyone_to_the_checkpoint_before(ref, tmp_path, caplog, damage):
    save(tmp_path, ref, pair(), 1)
    save(tmp_path, ref, pair(2.0), 2)
    (place,) = (tmp_path / "store" / "product" / "checkpoints" / "step-000002").glob("state-*-00001-*.safetensors")
    data = place.read_bytes()
    place.unlink()
    if damage != "missing":
        place.write_bytes(data[:-4] if damage == "torn" else data[:-1] + bytes([data[-1] ^ 1]))
    back = pair(5.0)
    with caplog.at_level(logging.WARNING):
        assert restore(tmp_path, ref, back) == [1, 1]
    assert "skipping the checkpoint of step 2" in caplog.text
    for mine, theirs in zip(back, pair(), strict=True):
        for one, other in zip(mine.held_state(), theirs.held_state(), strict=True):
            assert torch.equal(one.tensors["exp_avg"], other.tensors["exp_avg"])


def test_remnants_of_another_attempt_are_never_part_of_it_and_go(ref, tmp_path):
    store = LocalStore(ref)
    place = "product/checkpoints/step-000002"
    store.put_bytes(f"{place}/part-0000000b0001-00001.json", parts.PartSheet().model_dump_json().encode())
    store.put_bytes(f"{place}/state-0000000b0001-00001-00000.safetensors", b"torn")
    store.put_bytes(f"{place}/manifest.json", b"not a manifest")
    save(tmp_path, ref, pair(), 2)
    names = {key.rsplit("/", 1)[-1] for key in store.list(place)}
    assert names == {
        "checkpoint.json", "manifest.json", "state-0000000a0001-00000-00000.safetensors",
        "state-0000000a0001-00001-00000.safetensors",
    }  # fmt: skip
    assert restore(tmp_path, ref, pair(5.0)) == [2, 2]


def test_training_goes_on_while_the_copy_is_written(ref, tmp_path, monkeypatch):
    """What the next step changes is not in the checkpoint."""
    going_on = threading.Event()
    original = LocalStore.put_blocks

    def waiting(self, key, blocks):
        assert going_on.wait(60)
        return original(self, key, blocks)

    monkeypatch.setattr(LocalStore, "put_blocks", waiting)
    table = filled(0, 1, "partitions")
    (one,) = of_ranks(tmp_path, ref, [table])
    one.save(1)
    for piece in table.held_state():
        for tensor in piece.tensors.values():
            tensor.mul_(-3)
    going_on.set()
    one.wait()
    back = Table(0, 1, "partitions")
    restore(tmp_path, ref, [back])
    assert all(torch.equal(back.flat[name][kind], whole_state()[name][kind]) for name in SHAPES for kind in KINDS)


@pytest.mark.parametrize("room", ["for everything", "for one file"])
def test_host_memory_stays_within_its_bound(ref, tmp_path, monkeypatch, caplog, room):
    monkeypatch.setattr(checkpoint_module, "FILE_ELEMENTS", 300)
    held = ELEMENTS * ELEMENT_BYTES
    spare = held / host_copy._USABLE + 1 if room == "for everything" else held / 2
    monkeypatch.setattr(host_copy, "spare_memory", lambda: spare - one._host.allocated)
    most = []
    original = LocalStore.put_blocks

    def counting(self, key, blocks):
        most.append(one._host.allocated)
        return original(self, key, blocks)

    monkeypatch.setattr(LocalStore, "put_blocks", counting)
    (one,) = of_ranks(tmp_path, ref, [filled(0, 1, "partitions")])
    for step in (1, 2):
        with caplog.at_level(logging.WARNING):
            one.save(step)
        assert ("training waits while the checkpoint" in caplog.text) == (room == "for one file")
        one.wait()
    assert max(most) == (held if room == "for everything" else 300 * ELEMENT_BYTES)
    back = Table(0, 1, "partitions")
    assert restore(tmp_path, ref, [back]) == [2]
    assert all(torch.equal(back.flat[name][kind], whole_state()[name][kind]) for name in SHAPES for kind in KINDS)


def test_memory_that_is_allocated_ahead_is_what_the_first_checkpoint_takes(monkeypatch):
    files = into_files(filled(0, 1, "partitions").own_state(), 300)
    host = host_copy.HostCopy(1)
    host.prepare(files)
    assert host.allocated == ELEMENTS * ELEMENT_BYTES
    places = [buffer.data_ptr() for buffer in host._buffers]
    assert [copy.data_ptr() for copy in host.take(files)] == places
    monkeypatch.setattr(host_copy, "spare_memory", lambda: 0)
    none = host_copy.HostCopy(1)
    none.prepare(files)
    assert none.allocated == 0


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    files = into_files(filled(0, 1, "partitions").own_state(), 300)
    monkeypatch.setattr(host_copy, "spare_memory", lambda: 3 * ELEMENTS * ELEMENT_BYTES)
    assert [host_copy.HostCopy(ranks).fits(files) for ranks in (1, 2, 3)] == [True, True, False]


# Reading


def test_a_checkpoint_of_the_version_before_is_read_in_slices(tmp_path):
    state = whole_state()
    for number, name in enumerate(SHAPES):
        tensors = {f"{kind}/{name}": state[name][kind].view(SHAPES[name]) for kind in KINDS}
        save_file(tensors, tmp_path / f"state-{number:05d}.safetensors")
    save_file({"states": torch.arange(12, dtype=torch.uint8).view(2, 6)}, tmp_path / "random.safetensors")
    files = ", ".join(f'"{name}": "state-{number:05d}.safetensors"' for number, name in enumerate(SHAPES))
    sheet = f'{{"version": 1, "step": 5, "adam_steps": 5, "seed": 1, "world_size": 2, "parameters": {{{files}}}}}'
    (tmp_path / "checkpoint.json").write_text(sheet)
    with Checkpoint(tmp_path, 5, SHAPES) as opened:
        for rank in range(3):
            table = Table(rank, 3, "partitions")
            opened.load(table.held_state())
            for one in table.held_state():
                wanted = state[one.name]
                assert all(torch.equal(one.tensors[k], wanted[k][one.start : one.start + one.numel]) for k in KINDS)
        assert opened.random_state(1).tolist() == [6, 7, 8, 9, 10, 11]
        assert opened.random_state(2) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"param/2.bias/0": None, "exp_avg/2.bias/0": None, "exp_avg_sq/2.bias/0": None}, "2.bias is not whole"),
        ({f"{kind}/2.bias/49": torch.ones(1) for kind in KINDS}, "2.bias is not whole"),
        ({f"{kind}/2.bias/50": torch.ones(1) for kind in KINDS}, "2.bias is not whole"),
        ({f"{kind}/3.bias/0": torch.ones(1) for kind in KINDS}, "no part of a trained parameter"),
        ({"exp_avg/2.bias/0": torch.ones(49)}, r"exp_avg of 2.bias from 0 is F32 \[49\], expected F32 \[50\]"),
        ({"exp_avg/2.bias/0": None}, "cannot be read"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(tmp_path, change, words):
    state = whole_state()
    tensors = {f"{kind}/{name}/0": state[name][kind] for name in SHAPES for kind in KINDS} | change
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, tmp_path / "state-0.safetensors")
    shapes = ", ".join(f'"{name}": {list(shape)}' for name, shape in SHAPES.items())
    (tmp_path / "checkpoint.json").write_text(
        f'{{"version": 2, "step": 5, "adam_steps": 5, "seed": 1, "world_size": 1, "parameters": {{{shapes}}}}}'
    )
    with pytest.raises(UserError, match=f"cannot be resumed: .*{words}"):
        Checkpoint(tmp_path, 5, SHAPES)


def test_a_parameter_of_another_shape_is_refused(ref, tmp_path):
    save(tmp_path, ref, [filled(0, 1, "partitions")], 1)
    table = Table(0, 1, "partitions")
    table.parameters["2.weight"] = torch.empty(SHAPES["2.weight"][::-1])
    with pytest.raises(UserError, match=r"2.weight is \[50, 16\], expected \[16, 50\]"):
        restore(tmp_path, ref, [table])
