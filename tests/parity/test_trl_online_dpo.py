"""Online DPO: on the same sampled answers our pairs, loss and gradients are those of TRL's OnlineDPOTrainer.

TRL 1.16 has no trainer of XPO or Nash-MD any more; `tests/objectives/test_online.py` holds them to their definitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.data.readers import Prompt
from polm.models.loading import load_model
from polm.recipe_online import OnlineSettings
from polm.rewards.base import Reward
from polm.rollout.generate import Completion
from polm.stages.common import Frozen
from polm.stages.online import build_objective, build_pair_trees, find_matches
from polm.stages.rollout_source import add_scores
from polm.stages.rollouts import Rollout
from polm.tokens import collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
online_dpo = pytest.importorskip("trl.experimental.online_dpo")

PROMPTS = ["w1 w2 w3", "w4", "w30 w31 w32 w33 w34"]
ANSWERS = [["w9 w8 <eos>", "w10 w11 w12 w13 <eos>"], ["w5 w6 w7 w5 w11", "w20 <eos>"], ["w2 <eos>", "w3 w2 <eos>"]]
REWARDS = [[0.1, 0.7], [2.0, -1.0], [0.4, 0.5]]


def build_their_inputs(tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, ...]:
    """What TRL's `_generate` hands back: the first answers of all prompts, then the second ones; prompts padded on the
    left, answers on the right."""
    prompts = [tokenizer.convert_tokens_to_ids(p.split()) for p in PROMPTS] * 2
    answers = [tokenizer.convert_tokens_to_ids(pair[i].split()) for i in (0, 1) for pair in ANSWERS]
    width, length = max(map(len, prompts)), max(map(len, answers))
    pad = tokenizer.pad_token_id
    return (
        torch.tensor([[pad] * (width - len(p)) + p for p in prompts]),
        torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        torch.tensor([a + [pad] * (length - len(a)) for a in answers]),
        torch.tensor([[1] * len(a) + [0] * (length - len(a)) for a in answers]),
    )


def build_our_rollout(tokenizer: PreTrainedTokenizerFast) -> Rollout:
    completions = [
        Completion(p, s, np.array(tokenizer.convert_tokens_to_ids(text.split())), np.zeros(1), "stop", text)
        for p, pair in enumerate(ANSWERS)
        for s, text in enumerate(pair)
    ]
    rewards = [Reward(value, "scored") for pair in REWARDS for value in pair]
    encoded = [np.array(tokenizer.convert_tokens_to_ids(p.split())) for p in PROMPTS]
    return Rollout(0, [Prompt(p, "", "") for p in PROMPTS], encoded, completions, rewards)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_online_dpo(
    loss: str,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model.config._name_or_path

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        del prompts, completions
        return [pair[i] for i in (0, 1) for pair in REWARDS]

    trainer = online_dpo.OnlineDPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        reward_funcs=reward,
        args=online_dpo.OnlineDPOConfig(beta=0.3, loss_type=loss, **arguments),
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        processing_class=tokenizer,
    )
    losses: list[torch.Tensor] = []
    monkeypatch.setattr(trainer, "_generate", lambda *_: (*build_their_inputs(tokenizer), None))
    monkeypatch.setattr(trainer.accelerator, "backward", lambda value, **_: losses.append(value))
    trainer.training_step(trainer.model, {"prompt": PROMPTS})

    settings = OnlineSettings(loss=loss, beta=0.3)
    rollout = build_our_rollout(tokenizer)
    matches, counts = find_matches(rollout, 2, settings)
    assert counts == {"matches": 3, "ties": 0, "unjudged": 0}
    batch = collate(build_pair_trees(rollout, 2, matches))
    batch = add_scores(batch, "ref_logprobs", Frozen(load_model(folder)), "fp32", 1.0)
    metrics = agree(losses[0], model, build_objective(settings), learner, [batch])
    theirs = {name: values[-1] for name, values in trainer.stats.items() if values}
    assert metrics["dpo/margin"] == pytest.approx(theirs["rewards/margins"], rel=1e-4, abs=1e-5)
    assert metrics["dpo/chosen_logprob"] == pytest.approx(theirs["logps/chosen"], rel=1e-4)
    assert metrics["dpo/accuracy"] == pytest.approx(theirs["rewards/accuracies"])
    assert abs(theirs["rewards/margins"]) > 0.01
