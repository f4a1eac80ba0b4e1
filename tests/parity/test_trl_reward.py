"""Reward models: our losses and gradients equal those of TRL's RewardTrainer, and of the token classification that its
PRM trainer minimised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from polm.data.steps import build_step_tree, encode_separator, encode_steps
from polm.models.heads import Layout, load_scalar_model
from polm.objectives.process_reward_model import build_process_reward_model
from polm.objectives.reward_model import build_reward_model
from polm.tokens import TokenBatch, build_completions, collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PAIRS = [  # prompt, chosen, rejected, margin
    ("w1 w2 w3", "w9 w8", "w10 w11 w12 w13", 0.5),
    ("w4", "w5 w6 w7 w5 w11", "w20", 0.0),
    ("w30 w31 w32 w33 w34", "w2", "w3 w2", 1.5),
]
STEPS = [  # prompt, steps, labels
    ("w1 w2 w3", ["w9 w8", "w4", "w10 w11"], [True, True, False]),
    ("w4", ["w5 w6 w7"], [True]),
    ("w30 w31", ["w2 w2", "w3"], [False, True]),
]


def build_classifiers(model: PreTrainedModel, layout: Layout, labels: int, folder: Path) -> tuple[Any, PreTrainedModel]:
    """Theirs, made by transformers with its own random head, and ours, loaded from the same checkpoint."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.classifier_dropout = labels, 0.0
    kind = AutoModelForSequenceClassification if layout == "sequence" else AutoModelForTokenClassification
    torch.manual_seed(1)
    theirs = kind.from_config(config, attn_implementation="eager", dtype=torch.float32)
    theirs.save_pretrained(folder / "classifier")
    return theirs, load_scalar_model(folder / "classifier", num_labels=labels)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [None, 0.05])
def test_reward(
    margin: bool,
    centring: float | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
    tmp_path: Path,
) -> None:
    # Theirs skips the padding token at the end of a sequence: no answer ends with it.
    theirs, ours = build_classifiers(model, "sequence", 1, tmp_path)
    rows = [
        {"prompt": p + " ", "chosen": f"{c} <eos>", "rejected": f"{r} <eos>", **({"margin": m} if margin else {})}
        for p, c, r, m in PAIRS
    ]
    trainer = trl.RewardTrainer(
        model=theirs,
        args=trl.RewardConfig(center_rewards_coefficient=centring, **arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, dict(inputs))
    metrics = agree(their_loss, theirs, build_reward_model(centring or 0.0), ours, [build_pairs(tokenizer, margin)])
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["reward/accuracy"] == pytest.approx(found["accuracy"])
    assert metrics["reward/margin"] == pytest.approx(found["margin"], rel=1e-4, abs=1e-5)
    mean = (metrics["reward/chosen"] + metrics["reward/rejected"]) / 2
    assert mean == pytest.approx(found["mean_reward"], rel=1e-4, abs=1e-5)
    assert abs(found["margin"]) > 1e-3


def build_pairs(tokenizer: PreTrainedTokenizerFast, margin: bool) -> TokenBatch:
    trees = []
    for prompt, chosen, rejected, m in PAIRS:
        answers = [[*tokenizer.convert_tokens_to_ids(a.split()), tokenizer.eos_token_id] for a in (chosen, rejected)]
        marks = [{"sign": 1.0, **({"margin": m} if margin else {})}, {"sign": -1.0}]
        trees.append(build_completions(tokenizer.convert_tokens_to_ids(prompt.split()), answers, marks=marks))
    return collate(trees)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_process_reward(
    micro_batches: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, agree: Any, tmp_path: Path
) -> None:
    """TRL 1.16 has no PRM trainer any more. The one before it (`trl.experimental.prm`) put a separator behind each
    step, labelled its last token and left the loss to the model: so does this test."""
    theirs, ours = build_classifiers(model, "token", 2, tmp_path)
    separator = encode_separator(tokenizer, "w39")
    rows, trees = [], []
    for prompt, steps, labels in STEPS:
        prompt_ids = tokenizer.convert_tokens_to_ids(prompt.split())
        row: dict[str, list[int]] = {"input_ids": list(prompt_ids), "labels": [-100] * len(prompt_ids)}
        for step, label in zip(steps, labels, strict=True):
            ids = [*tokenizer.convert_tokens_to_ids(step.split()), *separator]
            row["input_ids"] += ids
            row["labels"] += [-100] * (len(ids) - 1) + [int(label)]
        rows.append(row)
        ids, ends = encode_steps(tokenizer, steps, separator)
        assert [*prompt_ids, *ids] == row["input_ids"]
        trees.append(build_step_tree(torch.tensor(prompt_ids).numpy(), ids, ends, [float(y) for y in labels]))
    inputs = DataCollatorForTokenClassification(tokenizer)(rows)
    theirs.train()
    their_loss = theirs(**inputs).loss
    size = -(-len(trees) // micro_batches)
    batches = [collate(trees[a : a + size]) for a in range(0, len(trees), size)]
    metrics = agree(their_loss, theirs, build_process_reward_model(), ours, batches)
    labels = [y for _, _, own in STEPS for y in own]
    assert metrics["steps/label"] == pytest.approx(sum(labels) / len(labels))
