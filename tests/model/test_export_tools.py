"""An exported folder under other people's tools: Trainer, TRL, PEFT, accelerate, torch.compile, pickle."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState, disk_offload, infer_auto_device_map
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

KINDS = ("teacher", "hybrid", "pure")
ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "logging_steps": 1,
    "max_grad_norm": 1e9,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def load(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    return kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module", params=("hybrid", "pure"))
def folder(request: pytest.FixtureRequest, exported: dict[str, Path]) -> Path:
    return exported[request.param]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variables of a process group that another test has opened: accelerate would take this process for one
    of several."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    PartialState._reset_state()


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load(folder)


def rows() -> list[dict[str, list[int]]]:
    """Eight documents of different lengths, without special tokens."""
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 60, (n,), generator=generator).tolist()} for n in (9, 5, 14, 7, 3, 12, 8, 6)]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the right; the labels of every second document begin late."""
    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
    labels = ids.masked_fill(ids == 0, -100)
    for row, given in enumerate(batch):
        labels[row, : len(given["input_ids"]) % 2 * 3] = -100
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def first_step(trainer: Trainer) -> tuple[float, float]:
    """Loss and gradient norm of the one step, which moves nothing."""
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_gives_one_loss_and_gradient_however_a_step_is_split(exported, tmp_path: Path, kind: str) -> None:
    seen = []
    for size, more in (
        (8, {}),
        (2, {}),
        (2, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            **ONE_STEP,
            **more,
        )
        trainer = Trainer(load(exported[kind]), arguments, data_collator=collate, train_dataset=rows())
        assert trainer.model_accepts_loss_kwargs
        seen.append(first_step(trainer))
    for got in seen[1:]:
        assert got == pytest.approx(seen[0], rel=1e-4)
    batch = collate(rows())
    assert load(exported[kind])(**batch).loss.item() == pytest.approx(seen[0][0], rel=1e-3)


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_sft_packs_accumulates_and_checkpoints(exported, tmp_path: Path, kind: str, adapted: bool) -> None:
    tokenizer, seen = AutoTokenizer.from_pretrained(exported[kind], trust_remote_code=True), []
    for size, more in (
        (8, {"gradient_checkpointing": False}),
        (2, {"gradient_checkpointing": True, "padding_free": True}),
        (4, {"padding_free": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        arguments = SFTConfig(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_length=None,
            bf16=False,
            **ONE_STEP,
            **more,
        )
        data = Dataset.from_list(rows())
        trainer = SFTTrainer(
            load(exported[kind]), arguments, train_dataset=data, processing_class=tokenizer,
            peft_config=lora if adapted else None,
        )  # fmt: skip
        seen.append(first_step(trainer))
    for got in seen[1:]:
        assert got == pytest.approx(seen[0], rel=1e-4)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained) == adapted
    assert len(trained) == 3 * 3 * 2 or not adapted


def test_parts_are_where_tools_look_for_them(model: PreTrainedModel, tokens: Tensor) -> None:
    with torch.no_grad():
        logits = model(tokens).logits
        for part in (model.model, model.base_model, model.get_decoder()):
            assert torch.equal(model.lm_head(part(tokens).last_hidden_state), logits)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, logits)
    [layer] = model._no_split_modules
    assert {type(each).__name__ for each in model.model.layers} == {layer}
    assert not model.model.config.base_model_tp_plan
    assert not any("self_attn" in name for name in model.tp_plan)


def test_outputs_are_transformers_own(folder: Path, tokens: Tensor) -> None:
    model = load(folder, attn_implementation="eager")
    kept = model.config.attention_layers
    with torch.no_grad():
        plain = model(tokens)
        seen = model(tokens, output_hidden_states=True, output_attentions=True)
        assert len(seen.hidden_states) == 4
        # As in transformers' own hybrids: one for every layer that has attention.
        assert [a.shape for a in seen.attentions] == [(2, 4, 21, 21)] * len(kept)
        assert torch.equal(model.lm_head(seen.hidden_states[-1]), plain.logits)
        assert torch.equal(model(tokens, return_dict=False)[0], plain.logits)
        model.config.output_hidden_states = model.config.output_attentions = True
        assert len(model(tokens).hidden_states) == len(model.model(tokens).hidden_states) == 4
        assert len(model(tokens).attentions) == len(kept)
        model.config.return_dict = False
        assert isinstance(model(tokens), tuple)


def test_embeddings_can_be_resized_saved_and_loaded(model: PreTrainedModel, tokens: Tensor, tmp_path: Path) -> None:
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path / "resized")
    again = load(tmp_path / "resized")
    assert again.config.vocab_size == again.config.teacher_config().vocab_size == 80
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert model(tokens).logits.shape[-1] == 80
    assert again.config.tie_word_embeddings == (again.lm_head.weight is again.model.embed_tokens.weight)


def test_the_other_auto_classes_know_the_folder(folder: Path, model: PreTrainedModel, tokens: Tensor) -> None:
    bare = load(folder, AutoModel)
    classifier = load(folder, AutoModelForSequenceClassification, num_labels=3)
    padded = torch.cat([tokens, torch.zeros(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        assert torch.equal(bare(tokens).last_hidden_state, hidden)
        assert torch.equal(bare(tokens, return_dict=False)[0], hidden)
        scores = classifier.score(hidden[:, -1])
        got = classifier(padded, attention_mask=(padded != 0).long(), labels=torch.tensor([0, 2]))
        torch.testing.assert_close(got.logits, scores)
    torch.testing.assert_close(got.loss, torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2])))


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_a_copy_is_the_same_and_its_own(model: PreTrainedModel, tokens: Tensor, again: Callable[..., Any]) -> None:
    copied = again(model)
    assert type(copied) is type(model)
    with torch.no_grad():
        wanted = model(tokens).logits
        assert torch.equal(copied(tokens).logits, wanted)
        copied.config.attention_rope = True
        copied.model.layers[0].mlp.up_proj.weight.zero_()
        assert torch.equal(model(tokens).logits, wanted)
        assert not torch.equal(copied(tokens).logits, wanted)


def test_layers_are_whole_on_a_device_and_may_be_on_disk(
    model: PreTrainedModel, tokens: Tensor, tmp_path: Path
) -> None:
    whole = sum(p.numel() * 4 for p in model.parameters())
    places = infer_auto_device_map(
        model, max_memory={0: whole // 2, "cpu": 4 * whole}, no_split_module_classes=model._no_split_modules
    )
    assert not [name for name in places if name.count(".") > 2]
    with torch.no_grad():
        wanted = model(tokens).logits
        disk_offload(model, tmp_path, execution_device="cpu")
        torch.testing.assert_close(model(tokens).logits, wanted, atol=1e-5, rtol=1e-5)


def test_it_compiles(exported, tokens: Tensor) -> None:
    model = load(exported["hybrid"])
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(tokens[:, :9], use_cache=False).logits
        torch.testing.assert_close(got, model(tokens[:, :9]).logits, atol=1e-5, rtol=1e-5)


def test_a_cache_is_kept_copied_and_gone_on_from(model: PreTrainedModel, tokens: Tensor) -> None:
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    for more in (tokens[:, :3], tokens[:, 5:7]):
        text = torch.cat([tokens, more], 1)
        gone_on = model.generate(text, past_key_values=copy.deepcopy(cache), **settings)
        assert torch.equal(gone_on, model.generate(text, **settings))
    made = model.generate(tokens, return_dict_in_generate=True, **settings)
    text = torch.cat([made.sequences, tokens[:, :4]], 1)
    gone_on = model.generate(text, past_key_values=made.past_key_values, **settings)
    assert torch.equal(gone_on, model.generate(text, **settings))
    looked_up = model.generate(tokens[:1], prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(looked_up, model.generate(tokens[:1], **settings))
