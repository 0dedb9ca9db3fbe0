"""The plan of a teacher some of whose layers are linear attention already: its choices, sizes and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.choice import Difficulty
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe, parse_recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.jobs.choose.choose import choose_by_difficulty
from radlads.tasks.jobs.plan import plan
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.choice_plan import plan_choice
from radlads.tasks.jobs.report import card

# Of the published 4B, but for its depth.
TEACHER = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": True,
}
SOFTMAX = (3, 7, 11, 15)
GPU = JobResources(device="cuda", processes=1, threads=1, gpu_memory_gib=141.0)


def linear_recipe(tmp_path: Path, attention_layers: Any, **training: Any) -> Recipe:
    (tmp_path / "config.json").write_text(json.dumps(TEACHER))
    section = {"tokens": 1 << 24, "context": 2048, "batch": 8, "micro_batch": 1} | training
    return parse_recipe(
        {
            "name": "linear",
            "teacher": {"path": str(tmp_path)},
            "student": {"attention_layers": attention_layers},
            "data": {"train": {"sources": [{"kind": "hub", "path": "nobody/nothing"}]}},
            "align": section,
            "distill": section,
        }
    )


def planned(tmp_path: Path, attention_layers: Any, **training: Any) -> PlanReport:
    return plan.make_plan(linear_recipe(tmp_path, attention_layers, **training), GPU, preview=True, sizes_only=True)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ([], ()),
        ([11], (11,)),
        ({"count": 2, "choose": "even"}, (7, 15)),
        ({"count": 3, "choose": "last"}, (7, 11, 15)),
        ({"count": 1, "choose": "difficulty"}, ()),
    ],
)
def test_softmax_layers_alone_are_chosen_among(tmp_path: Path, asked: Any, kept: tuple[int, ...]) -> None:
    report = planned(tmp_path, asked)
    assert report.attention_layers == kept
    assert (report.num_layers, report.linear_layers) == (16, 12)
    assert any(line.startswith("12 of 16 layers are linear attention") for line in report.warnings)


@pytest.mark.parametrize(
    ("asked", "training", "message"),
    [
        ([2], {}, "student: attention_layers names layer 2, which is linear attention in the teacher"),
        ({"count": 4, "choose": "last"}, {}, "attention_layers.count is 4, of 4 layers"),
        ([3], {"reset_at_documents": True}, "align.reset_at_documents: the teacher's own linear-attention layers"),
        (list(SOFTMAX), {}, "keeps all 4 layers, so there is nothing to align"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, asked: Any, training: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(tmp_path, asked, **training)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + bool(training)  # of both stages, where both are at fault


def test_a_late_choice_is_among_softmax_layers(tmp_path: Path) -> None:
    config, tokenizer = (
        CONFIG_MAPPING["qwen3_5_text"](**TEACHER),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))),
    )
    for count in (3, 4):
        recipe = linear_recipe(tmp_path, {"count": count, "choose": "difficulty"})
        if count < len(SOFTMAX):
            choice = plan_choice(recipe, config, tokenizer, Findings())
            assert choice is not None
            assert choice.count == count
        else:
            with pytest.raises(UserError, match="count is 4, of 4 layers"):
                plan_choice(recipe, config, tokenizer, Findings())


def test_gaps_are_counted_among_softmax_layers(tmp_path: Path) -> None:
    """Layers 3 and 7 are neighbours: the two hardest, but a third in a row is one too many."""
    finals = {3: 0.9, 7: 0.8, 11: 0.7, 15: 0.1}
    rows = [
        {"loss": 1.0} | {f"layer_{layer:02d}": 1.0 + (end - 1.0) * step / 39 for layer, end in finals.items()}
        for step in range(40)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job: Any = SimpleNamespace(input=lambda name: tmp_path)
    free = Difficulty(gap_penalty=0, spread=0)
    assert choose_by_difficulty(job, SOFTMAX, 3, free)["attention_layers"] == [3, 7, 15]
    result = choose_by_difficulty(job, SOFTMAX, 2, free)
    assert result["attention_layers"] == [3, 7]
    assert [row["layer"] for row in result["layers"]] == list(SOFTMAX)


@pytest.mark.parametrize(("kept", "share"), [([], "In 4 of its 16 layers"), ([7], "In 3 of its 16 layers")])
def test_a_card_tells_mixers_from_layers_that_stayed(tmp_path: Path, kept: list[int], share: str) -> None:
    products: Any = SimpleNamespace(plan=planned(tmp_path, kept), attention_layers=lambda recipe: tuple(kept))
    text = card._introduction(products, linear_recipe(tmp_path, kept))
    assert f"{share}, a recurrent mixer with constant memory replaces softmax attention" in text
    assert "12 layers were linear attention before, and stayed as they were" in text


def test_a_card_does_not_call_a_window_recurrent() -> None:
    products: Any = SimpleNamespace(plan=None, attention_layers=lambda recipe: (), evaluation=None)
    recipe = load_recipe("smoke", {"student": {"variant": "sliding_window"}})
    text = card._introduction(products, recipe)
    assert "attention to the first and the last tokens alone" in text
    assert not any(word in text for word in ("recurrent", "linear"))
    assert "linear-attention" not in card._metadata(recipe)["tags"]
    assert "no softmax attention" not in str(card._limits(products, recipe))


def test_linear_layers_are_counted_as_what_they_are(tmp_path: Path) -> None:
    pure, kept = planned(tmp_path, []), planned(tmp_path, [3, 7])
    assert pure.groups["attention"] + pure.groups["mixer"] > kept.groups["attention"]
    of_linear = pure.groups["attention"]
    assert of_linear == 12 * (
        2560 * (2 * 16 * 128 + 2 * 32 * 128 + 2 * 32) + 2560 * 32 * 128 + 4 * (2 * 16 + 32) * 128 + 2 * 32 + 128
    )
    assert kept.groups["attention"] == of_linear + 2 * (2560 * 256 * (2 * 16 + 2 * 4 + 16) + 2 * 256)
    # Fewer mixers to align, and the products of tokens with tokens of two layers more to distill.
    assert pure.stages["align"]["flops"] > kept.stages["align"]["flops"]
    pair = 2 * 2048 * 16 * 256
    sizes = 2 * (pure.student_parameters - kept.student_parameters)
    difference = kept.stages["distill"]["flops"] - pure.stages["distill"]["flops"]
    # Norms and other vectors, a share of the sizes, are no matrices.
    assert difference == pytest.approx(3 * (2 * pair - sizes) * (1 << 24), rel=5e-3)
