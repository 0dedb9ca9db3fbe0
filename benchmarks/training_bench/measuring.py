"""Measurements of a rank's own steps: start times, durations, memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from radlads.model.mixers.shared.mixer import FirstValues
from training_bench.case import Case
from training_bench.memory import begin_record, end_record
from training_bench.profiling import Profile


class Watch:
    """Called before and after every optimizer step (counted from 1), and at what comes before the first.

    The measured steps lie between two waits for the device: whatever is done between steps counts.
    """

    def __init__(self, folder: Path, case: Case, device: torch.device, rank: int) -> None:
        self.folder, self.case, self.device, self.rank = folder, case, device, rank
        self.launched = json.loads((folder / "case.json").read_text(encoding="utf-8"))["launched"]
        self.found: dict[str, Any] = {"marks": {}, "losses": []}
        self.profile: Profile | None = None
        self._began, self._retries = 0.0, 0
        self._held: int | None = None

    def mark(self, what: str) -> None:
        """Record the seconds since the launch."""
        self.found["marks"][what] = round(time.time() - self.launched, 2)

    def before(self, step: int, *, student: nn.Module, teacher: nn.Module | None, objective: nn.Module) -> None:
        case = self.case
        if step == 1:
            self._wait()
            self.mark("first step begins")
        if case.memory and step == case.warmup and self.device.type == "cuda":
            self._held = torch.cuda.memory_allocated(self.device)
            begin_record()
        if step == case.warmup + 1:
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
                self._retries = torch.cuda.memory_stats(self.device)["num_alloc_retries"]
            self._began = time.perf_counter()
        if case.profile_steps and step == case.warmup + case.steps + 1:
            self.profile = Profile(self.device, case.profile_steps, keep=self.rank == 0)
            self.profile.begin(student=student, teacher=teacher, objective=objective)

    def after(self, step: int, loss: float) -> None:
        case = self.case
        self.found["losses"].append(loss)
        if step == 1:
            self._wait()
            self.mark("first step ended")
        if step == case.warmup and self._held is not None:
            self.found["memory"] = end_record(self.device, self._held)
        if step == case.warmup + case.steps:
            self._wait()
            self.found["seconds"] = (time.perf_counter() - self._began) / case.steps
            if self.device.type == "cuda":
                self.found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
                self.found["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
                retries = torch.cuda.memory_stats(self.device)["num_alloc_retries"] - self._retries
                self.found["retries"] = retries
                if case.cuda_graphs != "off":  # what a graph works with is reserved for it, and not allocated again
                    self.found["peak_bytes"] = self.found["reserved_bytes"]
        if self.profile is not None and step == case.num_steps:
            self.found["profile"] = self.profile.end()

    def write(self) -> None:
        """Write the results for the process that launched this one."""
        path = self.folder / f"measured-{self.rank}.json"
        path.write_text(json.dumps(self.found), encoding="utf-8")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def mixer_memory(mix: Any, parameters: list[Tensor], shape: tuple[int, int, int], like: Tensor) -> dict[str, Any]:
    """Bytes that one mixer keeps of a token for its backward pass, its input, its output and its weights not counted.

    mix: (x [B,T,D], known) → its output; `known` are tensors that it is handed (first values, positions) and so does
    not keep for itself. The table lists what autograd saves; on a GPU the total is of the allocator, which also sees
    what is kept elsewhere.
    """
    x = torch.randn(shape, device=like.device, dtype=like.dtype, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*parameters, x]}
    seen: dict[int, tuple[int, str, str]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.device == like.device:
            kind = str(tensor.dtype).removeprefix("torch.")
            seen.setdefault(storage.data_ptr(), (storage.nbytes(), kind, "×".join(map(str, tensor.shape))))
        return tensor

    on_gpu = like.device.type == "cuda"
    before = torch.cuda.memory_allocated(like.device) if on_gpu else 0
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mix(x, known)
    tokens = shape[0] * shape[1]
    total = sum(size for size, _, _ in seen.values())
    if on_gpu:
        torch.cuda.synchronize(like.device)
        total = torch.cuda.memory_allocated(like.device) - before - out.untyped_storage().nbytes()
    kept: dict[str, float] = {}
    for size, kind, dims in seen.values():
        kept[f"{kind} {dims}"] = kept.get(f"{kind} {dims}", 0.0) + size / tokens
    return {"bytes_per_token": total / tokens, "width_bytes": shape[2] * like.element_size(), "saved": kept}


def product_mixer_memory(student: Any, case: Case) -> dict[str, Any]:
    """`mixer_memory` of the second mixer of a student, or of its only one, at the case's micro-batch."""
    mixers = list(student.mixers().values())
    one, first_one = mixers[min(1, len(mixers) - 1)], mixers[0]
    like = one.o_proj.weight
    length = case.context // case.sequence_parallel
    shape = (case.micro_batch, length, student.config.hidden_size)
    positions = torch.arange(length, device=like.device).unsqueeze(0)
    rope = student.model.rotary_emb(like.new_empty(1), positions)
    first = None
    if one is not first_one:
        with torch.no_grad():
            given = first_one.mix(torch.randn(shape, device=like.device, dtype=like.dtype), rope=rope).first
        first = FirstValues(*(None if part is None else part.detach().requires_grad_() for part in given))

    def mix(x: Tensor, known: set[int]) -> Tensor:
        known |= {part.untyped_storage().data_ptr() for part in (*rope, *(first or ())) if part is not None}
        return one.mix(x, rope=rope, first=first).out

    return mixer_memory(mix, list(one.parameters()), shape, like)
