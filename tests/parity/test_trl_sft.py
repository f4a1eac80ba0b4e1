"""Supervised fine-tuning, plain and DFT: our loss and gradients equal those of TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.objectives.dft import build_dft
from polm.objectives.ntp import build_ntp
from polm.tokens import Segment, build_completions, collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PAIRS = [("w1 w2 w3", "w9 w8"), ("w4", "w5 w6 w7 w5 w11"), ("w30 w31 w32 w33 w34", "w2")]
TALKS = [["w1 w2", "w3 w4 w5", "w6", "w7 w8"], ["w9 w10 w11", "w12"]]  # user, assistant, user, assistant


def compute_theirs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[torch.Tensor, int]:
    """TRL's loss of the rows as one batch, and its number of labels."""
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    num_labels = int((inputs["labels"][:, 1:] != -100).sum())
    return trainer.compute_loss(trainer.model, inputs), num_labels


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_completion_only(
    num_batches: int,
    loss_type: str,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    trees = []
    for prompt, completion in PAIRS:
        ids = [tokenizer.convert_tokens_to_ids(text.split()) for text in (prompt, completion)]
        trees.append(build_completions(ids[0], [[*ids[1], tokenizer.eos_token_id]]))
    rows = [{"prompt": prompt + " ", "completion": completion} for prompt, completion in PAIRS]
    arguments |= {"completion_only_loss": True, "loss_type": loss_type}
    their_loss, num_labels = compute_theirs(model, tokenizer, arguments, rows)
    batches = [collate(trees)] if num_batches == 1 else [collate(trees[:1]), collate(trees[1:])]
    assert num_labels == sum(batch.num_targets for batch in batches) == 11
    metrics = agree(their_loss, model, build_dft() if loss_type == "dft" else build_ntp(), learner, batches)
    if loss_type == "nll":
        assert metrics["ntp/nll"] == pytest.approx(their_loss.item(), rel=1e-5)
    else:
        assert metrics["ntp/nll"] > 2.0 * their_loss.item()  # the weights are far from 1


def test_assistant_only_over_several_turns(
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    trees, rows = [], []
    for talk in TALKS:
        words, weights, messages = [], [], []
        for i, content in enumerate(talk):
            role = ("user", "assistant")[i % 2]
            spoken = [*content.split(), "<eos>"] if role == "assistant" else content.split()
            words += [role, *spoken]
            weights += [0, *[i % 2] * len(spoken)]  # the role itself is context
            messages.append({"role": role, "content": content})
        ids = np.array(tokenizer.convert_tokens_to_ids(words))
        trees.append((Segment(ids, streams={"weights": np.array(weights, dtype=np.float32)}),))
        rows.append({"messages": messages})
    arguments["assistant_only_loss"] = True
    their_loss, num_labels = compute_theirs(model, tokenizer, arguments, rows)
    batch = collate(trees)
    assert num_labels == batch.num_targets == 9
    agree(their_loss, model, build_ntp(), learner, [batch])
