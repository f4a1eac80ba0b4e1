"""RLOO: our advantages, loss and gradients equal those of TRL's RLOOTrainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.models.loading import load_model
from polm.objectives.policy_gradient import build_policy_gradient
from polm.recipe_rl import RLOOSettings
from polm.rewards.base import Reward
from polm.stages.rloo import assign
from polm.stages.rollout_source import RolloutTokens
from polm.tokens import collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

GROUP = 3
MAX_COMPLETION_TOKENS = 7
PROMPTS = ["w1 w2 w3", "w4 w5"]
SETTING: dict[str, Any] = {"kl_beta": 0.0, "max_completion_tokens": MAX_COMPLETION_TOKENS}


def build_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], **more: Any
) -> Any:
    def reward(completion_ids: list[list[int]], **unused: Any) -> list[float]:
        del unused
        return [float(sum(ids) % 5) / 3 for ids in completion_ids]

    trainer = trl.RLOOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.RLOOConfig(
            per_device_train_batch_size=GROUP * len(PROMPTS),
            num_generations=GROUP,
            max_completion_length=MAX_COMPLETION_TOKENS,
            temperature=1.0,
            **arguments,
            **more,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("whiten", [False, True])
def test_from_rollout_to_loss(
    whiten: bool,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
    rows: Any,
) -> None:
    """TRL samples, rewards, scores its reference, takes the KL off the rewards and computes its loss; ours follows from
    ids and rewards alone."""
    trainer = build_trainer(model, tokenizer, arguments, beta=0.3, normalize_advantages=whiten)
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(GROUP)])
    their_loss = trainer.compute_loss(trainer.model, inputs)
    rewards = [Reward(value, "scored") for value in trainer._logs["rewards"]["reward"]]
    batch = collate(rows.build_trees({**inputs, "advantages": torch.zeros(len(rewards))}))
    completions_N = torch.arange(len(rewards))[:, None].expand_as(inputs["completion_mask"])
    with torch.no_grad():
        tokens = RolloutTokens(
            completions_N=completions_N[inputs["completion_mask"].bool()],
            sampler_logprobs_N=score(learner, batch).logprobs_N,
            ref_logprobs_N=score(load_model(model.config._name_or_path), batch).logprobs_N,
        )
    rollout: Any = SimpleNamespace(
        rewards=rewards, groups_R=torch.arange(len(PROMPTS)).repeat_interleave(GROUP).numpy()
    )
    settings = RLOOSettings(updates=1, kl_beta=0.3, whiten_advantages=whiten)
    credit = assign(settings, rollout, tokens, None)
    # TRL divides by the spread + 1e-4, we by the root of the variance + 1e-8.
    assert credit.advantages_R.tolist() == pytest.approx(
        inputs["advantages"].tolist(), rel=3e-4 if whiten else 2e-5, abs=2e-5
    )
    assert float(abs(credit.advantages_R).max()) > 0.1
    objective = build_policy_gradient(clip_low=0.2, clip_high=0.2, normalize="sequences", level="sequence", **SETTING)
    ours = collate(rows.build_trees({**inputs, "advantages": inputs["advantages"]}))
    agree(their_loss, model, objective, learner, [ours])


def test_off_policy_and_clipped(
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
    rows: Any,
) -> None:
    """The ratio of a completion is the product over its tokens, and is clipped as one."""
    trainer = build_trainer(model, tokenizer, arguments, epsilon=0.15, epsilon_high=0.25)
    inputs = rows.build_inputs(model)
    inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    their_loss = trainer.compute_loss(trainer.model, inputs)
    objective = build_policy_gradient(clip_low=0.15, clip_high=0.25, normalize="sequences", level="sequence", **SETTING)
    agree(their_loss, model, objective, learner, [collate(rows.build_trees(inputs))])
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert theirs["clip_ratio/low_mean"] + theirs["clip_ratio/high_mean"] > 0.1  # clipping is at work
