"""A training pass reads nothing on the host: what a CUDA graph of it could not record is found without a GPU.

The torch forms of the kernels run here; tests/gpu/test_graphs.py records the passes themselves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from radlads.kernels.wkv6 import chunked as wkv6
from radlads.kernels.wkv7 import chunked as wkv7
from radlads.model.training.hidden_states import rows_are_whole
from radlads.model.training.objectives import Objective, build_objective
from radlads.tasks.contracts.recipe.losses import ExtendPhase
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Extend, Finetune, Phase, Pretrain
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec

SECTIONS: dict[str, Any] = {"align": Align, "distill": Distill, "finetune": Finetune, "extend": Extend}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
READS |= {"bincount", "histc", "_linalg_eigh", "_linalg_svd", "lift_fresh"}
"""Operators that wait for a GPU: they read a value, their result's shape depends on one, or they copy from the host."""


class HostReadError(Exception):
    """An operator that waits for the GPU."""


class NoHostReads(TorchDispatchMode):
    """Raises HostReadError where an operator would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, overload = func.overloadpacket.__name__, func._overloadname
        by_mask = packet in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if packet in READS or by_mask or (packet == "repeat_interleave" and overload == "Tensor"):
            raise HostReadError(str(func))
        return func(*args, **(kwargs or {}))


def objective(name: str, student: Any, teacher: Any, **changes: Any) -> Objective:
    extra = {"config": {}, "tokenizer": "x"} if name == "pretrain" else {}
    section = (SECTIONS | {"pretrain": Pretrain})[name](
        **{"tokens": 400, "context": 20, "batch": 2, **extra, **changes}
    )
    spec = TrainSpec(objective=name, section=section, teacher=TeacherRef(path="x", fingerprint="y"))
    built = build_objective(spec, student, teacher).train()
    for parameter_name, parameter in built.student.named_parameters():
        parameter.requires_grad_(built.trainable(parameter_name))
    return built


def run_pass(built: Objective, batch: dict[str, Tensor]) -> None:
    trained = [parameter for parameter in built.student.parameters() if parameter.requires_grad]
    with rows_are_whole():
        loss, _ = built(batch)
    torch.autograd.grad(loss, trained, grad_outputs=torch.ones_like(loss), allow_unused=True)


@pytest.fixture(autouse=True)
def one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms in plain torch look at the decay for the length of their chunks; kernels for GPUs have one length."""
    for module in (wkv6, wkv7):
        monkeypatch.setattr(module, "_choose_chunk", lambda *_: 4)


CASES = {
    "align": ("align", "qwen3", {}, {}),
    "align, seven terms": ("align", "llama", {}, {"loss": "comprehensive"}),
    "align, scaled": ("align", "llama", {}, {"loss": "scaled_mse"}),
    "distill": ("distill", "llama", {}, {"ce_weight": 0.1, "l2wrap": 1e-4, "temperature": 2.0}),
    "distill, reverse, hidden states": ("distill", "llama", {}, {"divergence": "reverse", "hidden_weight": 0.1}),
    "distill, hybrid": ("distill", "qwen3", {"attention_layers": (1,), "attention_rope": True}, {}),
    "distill, fading positions": ("distill", "qwen3", {"attention_layers": (1,)}, {"rope_fade": {"tokens": 100}}),
    "distill, scaled scores": ("distill", "llama", {"attention_layers": (1,), "attention_log_scale": 3}, {}),
    "distill, hxa079": ("distill", "qwen3", {"variant": "hxa079"}, {}),
    "distill, rwkv6": ("distill", "qwen2", {"variant": "rad_rwkv6"}, {}),
    "distill, gated deltanet": ("distill", "qwen3", {"variant": "gated_deltanet"}, {}),
    "finetune, masks": ("finetune", "llama", {}, {"assistant_only": True, "label_smoothing": 0.1}),
    "extend, kl": ("extend", "llama", {}, {"phases": (ExtendPhase(tokens=400, teacher_kl=0.1),)}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pass_reads_nothing_on_the_host(make_teacher: Any, make_student: Any, tokens: Tensor, case: str) -> None:
    name, family, how, changes = CASES[case]
    teacher = make_teacher(family)
    student = make_student(teacher, **how).train()
    batch = {"input_ids": tokens, "loss_mask": torch.ones_like(tokens, dtype=torch.bool)}
    built = objective(name, student, teacher, **changes)
    with NoHostReads():
        run_pass(built, batch)


def test_what_would_be_read_is_found(make_teacher: Any, make_student: Any, tokens: Tensor) -> None:
    """Packed documents, a spectrum, and transformers' own look at positions."""
    teacher = make_teacher("llama")
    student = make_student(teacher)
    ids = torch.zeros_like(tokens)
    packed = objective("distill", student, teacher, reset_at_documents=True)
    with NoHostReads(), pytest.raises(HostReadError):
        run_pass(packed, {"input_ids": tokens, "document_ids": ids})
    spectrum = objective("align", student, teacher, loss="comprehensive", comprehensive={"revision": "svd"})
    with NoHostReads(), pytest.raises(HostReadError):
        run_pass(spectrum, {"input_ids": tokens})
    with NoHostReads(), pytest.raises(HostReadError):
        teacher(tokens)


def test_rows_that_are_whole_give_the_same_numbers(make_teacher: Any, tokens: Tensor) -> None:
    teacher = make_teacher("qwen3")
    expected = teacher(tokens, use_cache=False).logits
    with rows_are_whole():
        assert torch.equal(teacher(tokens, use_cache=False).logits, expected)


def test_settings_that_change_a_pass_are_told(make_teacher: Any, make_student: Any) -> None:
    teacher = make_teacher("llama")
    phases = (Phase(tokens=80, temperature=1.5), Phase(tokens=320, temperature=1.5, ce_weight=0.25))
    distill = objective("distill", make_student(teacher), teacher, phases=phases)
    seen = []
    for step in (0, 1, 2):
        distill.begin_step(step)
        seen.append(distill.fixed_settings())
    assert seen[0] == seen[1] != seen[2]
    for change in ({"divergence": "reverse"}, {"hidden_weight": 0.1}):
        phases = (Phase(tokens=80), Phase(tokens=320, **change))
        distill = objective("distill", make_student(teacher), teacher, phases=phases)
        first = distill.fixed_settings()
        distill.begin_step(2)
        assert distill.fixed_settings() != first
    extend = objective(
        "extend",
        make_student(teacher),
        teacher,
        phases=(ExtendPhase(tokens=200, teacher_kl=0.1), ExtendPhase(tokens=200, context=40)),
    )
    kl = []
    for step in (0, 5):
        extend.begin_step(step)
        kl.append(extend.fixed_settings())
    assert kl == [0.1, 0.0]
