"""DPO: our loss, gradients, log-probabilities and rewards equal those of TRL's DPOTrainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.models.loading import load_model
from polm.objectives.preference import Knobs, build_preference
from polm.tokens import TokenBatch, build_completions, collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PAIRS = [  # prompt, chosen, rejected
    ("w1 w2 w3", "w9 w8", "w10 w11 w12 w13"),
    ("w4", "w5 w6 w7 w5 w11", "w20"),
    ("w30 w31 w32 w33 w34", "w2", "w3 w2"),
]


def build_batch(tokenizer: PreTrainedTokenizerFast, reference: PreTrainedModel, num_pairs: int) -> TokenBatch:
    trees = []
    for prompt, *answers in PAIRS[:num_pairs]:
        completions = [[*tokenizer.convert_tokens_to_ids(a.split()), tokenizer.eos_token_id] for a in answers]
        marks = [{"sign": 1.0}, {"sign": -1.0}]
        trees.append(build_completions(tokenizer.convert_tokens_to_ids(prompt.split()), completions, marks=marks))
    batch = collate(trees)
    ref_logprobs_T = torch.zeros(batch.num_tokens)
    with torch.no_grad():
        ref_logprobs_T[batch.targets_N] = score(reference, batch).logprobs_N
    return batch.with_streams(ref_logprobs=ref_logprobs_T)


# TRL's "sigmoid" takes no label smoothing; its "aot" of a single pair is the smoothed loss.
@pytest.mark.parametrize(("loss_type", "num_pairs", "smoothing"), [("sigmoid", 3, 0.0), ("aot", 1, 0.2)])
def test_dpo(
    loss_type: str,
    num_pairs: int,
    smoothing: float,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    folder = model.config._name_or_path
    rows = [{"prompt": p + " ", "chosen": c, "rejected": r} for p, c, r in PAIRS[:num_pairs]]
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        args=trl.DPOConfig(beta=0.3, loss_type=[loss_type], label_smoothing=smoothing, **arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, inputs)
    batch = build_batch(tokenizer, load_model(folder), num_pairs)
    assert batch.num_targets == int(inputs["completion_mask"].sum())
    metrics = agree(
        their_loss, model, build_preference("sigmoid", Knobs(beta=0.3, label_smoothing=smoothing)), learner, [batch]
    )
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for our_name, their_name in {
        "dpo/accuracy": "rewards/accuracies",
        "dpo/margin": "rewards/margins",
        "dpo/chosen_reward": "rewards/chosen",
        "dpo/rejected_reward": "rewards/rejected",
        "dpo/chosen_logprob": "logps/chosen",
        "dpo/rejected_logprob": "logps/rejected",
    }.items():
        assert metrics[our_name] == pytest.approx(theirs[their_name], rel=1e-4, abs=1e-5), our_name
    assert abs(theirs["rewards/margins"]) > 0.01  # the reference differs from the model, or nothing was tested
