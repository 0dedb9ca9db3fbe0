"""One rank of the plain build: the same step, written directly with transformers and torch.

    python -m torch.distributed.run --nproc-per-node N plain.py FOLDER

Modules of transformers, mixers in plain torch over fla's operator, whole logits in fp32, torch's cross entropy and KL,
torch's AdamW. One GPU: bf16 weights with fp32 masters beside them. Several: FSDP2 with fp32 parameters, bf16
arithmetic and fp32 reductions. It reads the product's files and its batches, so its losses can be compared.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.batch_plan import plan_batches
from radlads.tasks.jobs.data.loader import open_dataset
from training_bench.case import Case
from training_bench.measuring import Watch, mixer_memory
from training_bench.plain_mixers import VARIANTS, FirstValues, PlainMixer, compile_ahead, find_operator

_BETAS, _EPS, _CLIP, _RATE = (0.9, 0.95), 1e-8, 1.0, 1e-5
_GROUPS = {"mlp": ".mlp.", "embeddings": "embed_tokens.", "head": "lm_head.", "attention": ".self_attn."}


def build_student(case: Case, places: Mapping[str, str], dtype: torch.dtype) -> tuple[nn.Module, str]:
    """The teacher's own class with plain mixers in place of attention, and which operator they run."""
    if case.variant not in VARIANTS:
        raise UserError(f"the plain build has the variants {' and '.join(VARIANTS)}, not {case.variant}")
    folder = Path(places["student"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(places["teacher"], dtype=dtype)
    first, (operator, name) = FirstValues(), find_operator()
    tensors = _mixer_tensors(folder)
    for index, layer in enumerate(model.model.layers):
        if index in case.attention_layers:
            layer.self_attn.register_forward_pre_hook(_without_positions, with_kwargs=True)
        else:
            layer.self_attn = PlainMixer(layer.self_attn, tensors[index], config, first, operator).to(dtype)
    if case.gradient_checkpointing is True:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(case, key))
    return model, name


def _trains(case: Case, name: str) -> bool:
    if case.stage == "align":
        return ".self_attn." in name
    kept = any(f".layers.{layer}." in f".{name}" for layer in case.attention_layers)
    norms = "norms" in case.freeze and "norm" in name and ".self_attn." not in name
    final = "final_norm" in case.freeze and name == "model.norm.weight"
    frozen = any(_GROUPS[group] in name for group in case.freeze if group in _GROUPS and (group != "attention" or kept))
    return not (norms or final or frozen)


def _mixer_tensors(folder: Path) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                if ".self_attn." in name:
                    layer, _, own = name.split(".layers.")[1].partition(".self_attn.")
                    found.setdefault(int(layer), {})[own] = file.get_tensor(name)
    return found


def _without_positions(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    cos, sin = kwargs["position_embeddings"]
    return args, kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


class Step(nn.Module):
    """The loss of a batch."""

    def __init__(self, case: Case, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__()
        self.case, self.student, self._teacher = case, student, (teacher,)
        self._losses: list[Tensor] = []
        if case.stage == "align":
            for layer, (theirs, ours) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
                if layer not in case.attention_layers:
                    theirs.self_attn.register_forward_hook(self._compare(ours.self_attn), with_kwargs=True)

    def _compare(self, mixer: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            x, expected = args[0] if args else kwargs["hidden_states"], output[0].float()
            with torch.enable_grad():
                out = mixer(x, kwargs["position_embeddings"])[0].float()
                if self.case.loss == "mse":
                    self._losses.append(F.mse_loss(out, expected))
                else:
                    self._losses.append((expected - out).norm(dim=-1).mean() * out.shape[-1] ** -0.5)

        return hook

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        teacher = self._teacher[0]
        if self.case.stage == "align":
            self._losses.clear()
            with torch.no_grad():
                teacher.model(inputs, use_cache=False)
            return torch.stack(self._losses).mean()
        if self.case.stage == "distill":
            with torch.no_grad():
                expected = F.log_softmax(teacher(inputs, use_cache=False).logits.float(), dim=-1).flatten(0, 1)
            found = F.log_softmax(self.student(inputs, use_cache=False).logits.float(), dim=-1).flatten(0, 1)
            return F.kl_div(found, expected, log_target=True, reduction="batchmean")
        logits = self.student(inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class Optimizer:
    """AdamW over fp32: the parameters themselves under FSDP and on a CPU, copies of bf16 ones else."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        wide = all(parameter.dtype == torch.float32 for parameter in parameters)
        self.masters = parameters if wide else [nn.Parameter(p.detach().float()) for p in parameters]
        self._adam = torch.optim.AdamW(self.masters, lr=_RATE, betas=_BETAS, eps=_EPS, weight_decay=0.0, fused=True)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        self._adam.step()
        with torch.no_grad():
            if self.masters is not self.parameters:
                for master, parameter in zip(self.masters, self.parameters, strict=True):
                    parameter.copy_(master)
        self._adam.zero_grad(set_to_none=True)


def main(folder: Path) -> None:
    case = Case.read(folder / "case.json")
    places = json.loads((folder / "places.json").read_text(encoding="utf-8"))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = case.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    watch = Watch(folder, case, device, rank)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    student, operator = build_student(case, places, torch.float32 if world > 1 else dtype)
    student = student.to(device).train()
    teacher = None
    if case.stage != "finetune":
        teacher = AutoModelForCausalLM.from_pretrained(places["teacher"], dtype=dtype).to(device).eval()
        teacher.requires_grad_(False)
    if world > 1:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in student.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(student, mp_policy=policy)
    watch.mark("networks loaded")
    if on_gpu and operator.startswith("fla"):
        if rank == 0:
            compile_ahead(next(module for module in student.modules() if isinstance(module, PlainMixer)))
        distributed.barrier()
        watch.mark("fla compiled")
    how = "FSDP2, fp32 parameters" if world > 1 else "one process, fp32 masters"
    how += ", nothing in 8 bit" * (case.mlp_bits != 16 or case.teacher_bits != 16)
    watch.found |= {"build": f"plain, {operator}", "notes": f"transformers' modules, {operator}, whole logits, {how}"}
    step = Step(case, student, teacher)
    _train(case, watch, step, Optimizer([p for p in student.parameters() if p.requires_grad]), places, device)
    if world == 1:
        watch.found["mixer"] = _mixer_memory(case, student, dtype, device)
    watch.write()
    distributed.destroy_process_group()


def _train(
    case: Case, watch: Watch, step: Step, optimizer: Optimizer, places: Mapping[str, str], device: torch.device
) -> None:
    data = open_dataset(Path(places["data"])).split("train")
    plan = plan_batches(case.section(), data, distributed.get_world_size())[0]
    for number in range(1, case.num_steps + 1):
        watch.before(number, student=step.student, teacher=step._teacher[0], objective=step)
        losses = []
        profiled = watch.profile is not None
        if profiled and number == case.warmup + case.steps + 1:
            watch.profile.around(optimizer, "step", "optimizer")
        with _quick_search() if number == 1 else nullcontext():
            for index in range(plan.num_micro):
                tokens = plan.micro(number - 1, watch.rank, index)["input_ids"].to(device)
                loss = step(tokens)
                (loss / plan.num_micro).backward()
                losses.append(loss.detach())
        optimizer.step()
        mean = torch.stack(losses).mean()
        distributed.all_reduce(mean)
        watch.after(number, mean.item() / distributed.get_world_size())


def _quick_search() -> Any:
    """fla's kernels try their settings when they are first called: each for a few milliseconds, not a hundred."""
    if not torch.cuda.is_available():
        return nullcontext()
    from peers import search  # needs Triton

    return search()


def _mixer_memory(case: Case, student: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    mixers = [module for module in student.modules() if isinstance(module, PlainMixer)]
    one, like = mixers[min(1, len(mixers) - 1)], torch.empty(1, device=device, dtype=dtype)
    shape = (case.micro_batch, case.context, student.config.hidden_size)
    rope = student.model.rotary_emb(like, torch.arange(case.context, device=device).unsqueeze(0))
    with torch.no_grad():
        mixers[0](torch.randn(shape, device=device, dtype=dtype), rope)
    for name in ("v", "k"):
        if getattr(one.first, name) is not None:
            setattr(one.first, name, getattr(one.first, name).detach().requires_grad_())

    def mix(x: Tensor, known: set[int]) -> Tensor:
        given = (*rope, one.first.v, one.first.k)
        known |= {tensor.untyped_storage().data_ptr() for tensor in given if tensor is not None}
        return one(x, rope)[0]

    return mixer_memory(mix, list(one.parameters()), shape, like)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
