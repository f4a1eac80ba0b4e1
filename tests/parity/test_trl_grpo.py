"""GRPO: our advantages, loss and gradients equal those of TRL's GRPOTrainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.models.loading import load_model
from polm.objectives.policy_gradient import build_policy_gradient
from polm.signals.advantages import compute_group_advantages
from polm.tokens import TokenBatch, collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

GROUP = 3
MAX_COMPLETION_TOKENS = 7
PROMPTS = ["w1 w2 w3", "w4 w5"]
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
    rows: Any,
) -> None:
    inputs = rows.build_inputs(model)
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
    trees = rows.build_trees(inputs)
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
    rows: Any,
) -> None:
    """TRL samples, rewards, scores its reference, and computes its loss; ours follows from ids and rewards alone."""
    trainer = build_trainer(model, tokenizer, arguments, loss_type="grpo", beta=0.07, scale_rewards=scale)
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(GROUP)])
    their_loss = trainer.compute_loss(trainer.model, inputs)
    rewards_R = torch.tensor(trainer._logs["rewards"]["reward"])
    groups_R = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
    advantages_R = compute_group_advantages(rewards_R, groups_R, "std" if scale == "group" else "none")
    assert advantages_R.tolist() == pytest.approx(inputs["advantages"].tolist(), rel=1e-5, abs=1e-6)
    assert advantages_R.abs().max() > 0.1
    their_reference = inputs.pop("ref_per_token_logps")[inputs["completion_mask"].bool()]
    batch = collate(rows.build_trees({**inputs, "advantages": advantages_R}))
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


def test_the_correction_for_the_generator(
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
    rows: Any,
) -> None:
    """Where vLLM has drawn the samples, TRL weights the loss of a token by min(p_old / p_sampler, cap)."""
    trainer = build_trainer(model, tokenizer, arguments, loss_type="grpo", beta=0.07)
    inputs = rows.build_inputs(model)
    generator = torch.Generator().manual_seed(5)
    gap = 0.4 * torch.randn(inputs["old_per_token_logps"].shape, generator=generator) * inputs["completion_mask"]
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] - gap
    inputs["importance_sampling_ratio"] = torch.exp(gap).clamp(max=1.2)
    assert bool((torch.exp(gap) > 1.2).any())
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = "token_truncate"
    their_loss = trainer.compute_loss(trainer.model, inputs)
    objective = build_policy_gradient(
        clip_low=0.2,
        clip_high=0.2,
        kl_beta=0.07,
        normalize="sequences",
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        importance_cap=1.2,
    )
    trees = rows.build_trees(inputs, {"sampling_per_token_logps": "sampler_logprobs"})
    metrics = agree(their_loss, model, objective, learner, [collate(trees)])
    assert metrics["rl/importance_capped_fraction"] > 0.05
