"""GRPO: our advantages, loss and gradients equal those of TRL's GRPOTrainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.models.loading import load_model
from polm.objectives.policy_gradient import build_policy_gradient
from polm.signals.advantages import compute_group_advantages
from polm.tokens import TokenBatch, Tree, build_completions, collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

GROUP = 3
MAX_COMPLETION_TOKENS = 7
PROMPTS = ["w1 w2 w3", "w4 w5"]
LENGTHS = [7, 3, 5, 1, 6, 2]
MODES = {"grpo": "sequences", "bnpo": "tokens", "dapo": "tokens", "dr_grpo": "constant"}


def build_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], **more: Any
) -> Any:
    def reward(completion_ids: list[list[int]], **unused: Any) -> list[float]:
        del unused
        return [float(sum(ids) % 5) / 3 for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
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
    trainer.current_gradient_accumulation_steps = 1  # what the training loop would have set
    return trainer


def build_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two groups of three completions of unlike length, with old log-probabilities off by up to 0.8."""
    generator = torch.Generator().manual_seed(3)
    size = (GROUP * len(PROMPTS), MAX_COMPLETION_TOKENS)
    completion_mask = (torch.arange(size[1])[None] < torch.tensor(LENGTHS)[:, None]).long()
    completion_ids = torch.randint(5, 45, size, generator=generator) * completion_mask
    prompt_ids = torch.tensor([[6, 7, 8]] * GROUP + [[0, 9, 10]] * GROUP)
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    mask = torch.cat([(prompt_ids != 0).long(), completion_mask], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[:, -size[1] :, 0]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids != 0).long(),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.4, -0.8, 0.3, 0.7, -1.5]),
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": logprobs + 0.8 * (2 * torch.rand(size, generator=generator) - 1),
        "ref_per_token_logps": logprobs + 0.5 * torch.randn(size, generator=generator),
    }


def build_trees(inputs: dict[str, torch.Tensor]) -> list[Tree]:
    """TRL's padded rows as one tree a prompt."""
    names = {"old_per_token_logps": "old_logprobs", "ref_per_token_logps": "ref_logprobs"}
    trees = []
    for first in range(0, len(inputs["prompt_ids"]), GROUP):
        completions, streams = [], []
        for row in range(first, first + GROUP):
            kept = inputs["completion_mask"][row].bool()
            completions.append(inputs["completion_ids"][row][kept].numpy())
            advantage = np.full(len(completions[-1]), float(inputs["advantages"][row]))
            own = {ours: inputs[theirs][row][kept].numpy() for theirs, ours in names.items() if theirs in inputs}
            streams.append({"advantages": advantage, **own})
        prompt = inputs["prompt_ids"][first][inputs["prompt_mask"][first].bool()].numpy()
        trees.append(build_completions(prompt, completions, streams))
    return trees


@pytest.mark.parametrize(
    ("loss_type", "num_batches", "unbiased"),
    [("grpo", 1, True), ("grpo", 2, False), ("bnpo", 2, True), ("dapo", 1, False), ("dr_grpo", 2, True)],
)
def test_loss_with_clipping_and_penalty(
    loss_type: str,
    num_batches: int,
    unbiased: bool,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    inputs = build_inputs(model)
    trainer = build_trainer(
        model,
        tokenizer,
        arguments,
        loss_type=loss_type,
        epsilon=0.15,
        epsilon_high=0.25,
        beta=0.07,
        use_bias_correction_kl=unbiased,
    )
    their_loss = trainer.compute_loss(trainer.model, inputs)
    objective = build_policy_gradient(
        clip_low=0.15,
        clip_high=0.25,
        kl_beta=0.07,
        normalize=MODES[loss_type],  # type: ignore[arg-type]
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        unbiased_kl=unbiased,
        log_entropy=True,
    )
    trees = build_trees(inputs)
    batches: list[TokenBatch] = [collate(trees)] if num_batches == 1 else [collate([tree]) for tree in trees]
    metrics = agree(their_loss, model, objective, learner, batches)
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for our_name, their_name in {
        "rl/clip_low_fraction": "clip_ratio/low_mean",
        "rl/clip_high_fraction": "clip_ratio/high_mean",
        "rl/kl": "kl",
        "rl/entropy": "entropy",
    }.items():
        assert metrics[our_name] == pytest.approx(theirs[their_name], rel=1e-5), our_name
        assert theirs[their_name] > 0.05, their_name  # clipping and penalty are at work


@pytest.mark.parametrize("scale", ["group", "none"])
def test_from_rollout_to_loss(
    scale: str,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    """TRL samples, rewards, scores its reference, and computes its loss; ours follows from ids and rewards alone."""
    trainer = build_trainer(model, tokenizer, arguments, loss_type="grpo", beta=0.07, scale_rewards=scale)
    rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(GROUP)]
    inputs = trainer._generate_and_score_completions(rows)
    their_loss = trainer.compute_loss(trainer.model, inputs)
    rewards_R = torch.tensor(trainer._logs["rewards"]["reward"])
    groups_R = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
    advantages_R = compute_group_advantages(rewards_R, groups_R, "std" if scale == "group" else "none")
    assert advantages_R.tolist() == pytest.approx(inputs["advantages"].tolist(), rel=1e-5, abs=1e-6)
    assert advantages_R.abs().max() > 0.1
    their_reference = inputs.pop("ref_per_token_logps")[inputs["completion_mask"].bool()]
    batch = collate(build_trees({**inputs, "advantages": advantages_R}))
    ref_logprobs_T = torch.zeros(batch.num_tokens)
    with torch.no_grad():
        ref_logprobs_T[batch.targets_N] = score(load_model(model.config._name_or_path), batch).logprobs_N
    assert torch.allclose(ref_logprobs_T[batch.targets_N], their_reference, atol=1e-5)
    objective = build_policy_gradient(
        clip_low=0.2,
        clip_high=0.2,
        kl_beta=0.07,
        normalize="sequences",
        max_completion_tokens=MAX_COMPLETION_TOKENS,
    )
    agree(their_loss, model, objective, learner, [batch.with_streams(ref_logprobs=ref_logprobs_T)])
