"""The mixer `rwkv7` inside the official RWKV-7 model gives that model's own logits (a judge that we did not write)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from radlads.model.mixers import rwkv7
from radlads.model.mixers.shared.mixer import AttentionShape, Mixer
from radlads.model.mixers.shared.token_shift import previous_tokens
from radlads.model.weights.openmose import TENSOR_NAMES

# Each comes out of another order of the same fp32 sums; upstream and a plain loop differ by 5e-7.
TOLERANCE = 1e-5


class OfficialModel:
    """Embedding, blocks of time mixer and channel mixer, head, as BlinkDL's x070 has them; time mixers are ours."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.mixers = [self._mixer(i) for i in range(self.num_layers)]

    def _mixer(self, layer: int) -> Mixer:
        prefix = f"blocks.{layer}.att."
        own = {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}
        heads, head_dim = own["r_k"].shape
        no = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias", "qk_norm"), False)
        width = self.weights["emb.weight"].shape[1]
        shape = AttentionShape(width, heads, heads, head_dim, norm_eps=1e-6, **no)
        ranks = {"decay": "w1", "iclr": "a1", "gate": "g1", "value": "v1"}
        options = {f"{rank}_rank": own[name].shape[1] for rank, name in ranks.items() if name in own}
        resolved = rwkv7.Options.parse(options, variant="rwkv7").resolve(width, width)
        options = SimpleNamespace(**resolved.model_dump())
        mixer = rwkv7.Mixer(shape, options, layer=layer, num_layers=self.num_layers, first=layer == 0)
        for mine, theirs in TENSOR_NAMES.items():
            if f"{theirs}.weight" in own:
                own[f"{mine}.weight"] = own.pop(f"{theirs}.weight")
        mixer.load_state_dict(own)
        return mixer.eval()

    def norm(self, name: str, x_BTD: Tensor) -> Tensor:
        return layer_norm(x_BTD, x_BTD.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5)

    @torch.no_grad()
    def __call__(self, tokens_BT: Tensor, memory: list | None = None) -> tuple[Tensor, list]:
        """Logits [B,T,256], and per layer the time mixer's state and the channel mixer's last input."""
        x, first, after = self.norm("blocks.0.ln0", self.weights["emb.weight"][tokens_BT]), None, []
        for i, mixer in enumerate(self.mixers):
            state, last = (None, None) if memory is None else memory[i]
            mixed, first, state = mixer.mix(
                self.norm(f"blocks.{i}.ln1", x), first=first, state=state, output_state=True
            )
            x = x + mixed
            inner = self.norm(f"blocks.{i}.ln2", x)
            previous, last = previous_tokens(inner, last_BD=last)
            ffn = f"blocks.{i}.ffn."
            key = linear(inner + (previous - inner) * self.weights[f"{ffn}x_k"], self.weights[f"{ffn}key.weight"])
            x = x + linear(key.relu().square(), self.weights[f"{ffn}value.weight"])
            after.append((state, last))
        return linear(self.norm("ln_out", x), self.weights["head.weight"]), after


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    folder = shared_data / "references" / "rwkv7_834K"
    if not folder.is_dir():
        pytest.skip("the official RWKV-7 reference model is not beside the project")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> OfficialModel:
    return OfficialModel(load_file(folder / "rwkv7_834K_official_names.safetensors"))


@pytest.fixture(scope="module", params=["upstream", "long"])
def reference(request: pytest.FixtureRequest, folder: Path) -> tuple[Tensor, Tensor]:
    """Bytes [1,T], and the logits after the last of them: [1,n,256] for the last n."""
    if request.param == "upstream":
        logits = np.fromfile(folder / "expected-logits-7v0-834K.bin", dtype="<f4")
        # The quotation mark is part of the prompt.
        return torch.tensor([list(b'"in')]), torch.from_numpy(logits).view(1, 1, 256)
    with np.load(folder / "derived_longref_256bytes.npz", allow_pickle=False) as held:
        return torch.from_numpy(held["input_ids"])[None], torch.from_numpy(held["logits_f64"])[None]


def compare(got: Tensor, wanted: Tensor) -> None:
    got = got[:, -wanted.shape[1] :]
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= TOLERANCE


def test_the_whole_sequence_at_once(model: OfficialModel, reference: tuple[Tensor, Tensor]) -> None:
    tokens, wanted = reference
    compare(model(tokens)[0], wanted)


def test_one_byte_at_a_time(model: OfficialModel, reference: tuple[Tensor, Tensor]) -> None:
    tokens, wanted = reference
    memory, steps = None, []
    for t in range(tokens.shape[1]):
        logits, memory = model(tokens[:, t : t + 1], memory)
        steps.append(logits)
    compare(torch.cat(steps, 1), wanted)


def test_in_pieces(model: OfficialModel, reference: tuple[Tensor, Tensor]) -> None:
    tokens, wanted = reference
    memory, steps = None, []
    for piece in tokens.split(37, dim=1):
        logits, memory = model(piece, memory)
        steps.append(logits)
    compare(torch.cat(steps, 1), wanted)


def test_the_judge_notices(folder: Path, reference: tuple[Tensor, Tensor]) -> None:
    """A decay offset of 0.6, as a relative of this mixer has it; after three bytes there is not much to decay."""
    tokens, wanted = reference
    changed = OfficialModel(load_file(folder / "rwkv7_834K_official_names.safetensors"))
    for mixer in changed.mixers:
        mixer.design = replace(mixer.design, decay_offset=0.6)
    got = changed(tokens)[0][:, -wanted.shape[1] :]
    assert (got - wanted).abs().max() > (3 if wanted.shape[1] == 1 else 50) * TOLERANCE
