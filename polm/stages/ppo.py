"""`polm ppo`: proximal policy optimisation with a critic (arXiv 1707.06347; with language models 1909.08593)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polm.engine.device import use_bf16
from polm.engine.fit import Part
from polm.engine.score import score
from polm.models.actor_critic import ActorCritic
from polm.objectives.policy_gradient import build_policy_gradient
from polm.objectives.value import add_value_loss
from polm.recipe_rl import PPOSettings
from polm.signals.advantages import whiten
from polm.signals.gae import compute_explained_variance, compute_gae, compute_next_beta
from polm.stages.common import (
    Base,
    Context,
    Stage,
    StageResult,
    load_learner,
    new_ledger,
    start_stage,
    train,
)
from polm.stages.rollout_source import (
    Credit,
    RolloutSource,
    RolloutTokens,
    average_by_completion,
    build_token_rewards,
    load_reference,
    load_start,
)
from polm.stages.rollouts import REWARD_INPUTS, Rollout, build_sampler, collect_rewards
from polm.stages.scalar import Head, load_scalar_learner
from polm.text.tokenizer import require_same_tokenizer
from polm.tokens import Needs, Step, TokenBatch


@dataclass(frozen=True)
class PPOSource:
    """The source of rollouts, for a policy with its critic. With a `kl_target` each rollout sets the model's `kl_beta`
    for the next one: it is one of the weights, so a run that goes on from a checkpoint has it."""

    rollouts: RolloutSource

    @property
    def num_updates(self) -> int:
        return self.rollouts.num_updates

    @property
    def reads_weights(self) -> bool:
        return True

    def resumable(self, update: int) -> bool:
        return self.rollouts.resumable(update)

    def step(self, update: int, model: ActorCritic) -> Step:
        return self.rollouts.step(update, model.policy)


@torch.no_grad()
def score_values(settings: PPOSettings, pair: ActorCritic, batch: TokenBatch) -> Tensor:
    """The critic's values of the text before each target, [N]."""
    bf16 = use_bf16(settings.precision, pair.device.type)
    on_device = batch.to(pair.device)
    values_TL = score(pair.critic, on_device, Needs(values=True), bf16=bf16).values_TL
    assert values_TL is not None
    return values_TL[on_device.target_predictors_N, 0]


def assign(settings: PPOSettings, pair: ActorCritic, rollout: Rollout, tokens: RolloutTokens) -> Credit:
    """Generalised advantages of the tokens, and the returns that the critic learns; steers `pair.kl_beta`."""
    assert tokens.values_N is not None
    rewards_R, _ = collect_rewards(rollout.rewards)
    beta = float(pair.kl_beta)
    token_rewards_N, metrics = build_token_rewards(rewards_R, tokens, beta if settings.kl_in == "reward" else 0.0)
    if settings.whiten_rewards:
        token_rewards_N = whiten(token_rewards_N, shift_mean=False)
    advantages_N, returns_N = compute_gae(
        token_rewards_N, tokens.values_N, tokens.completions_N, gamma=settings.gamma, lam=settings.lam
    )
    metrics |= {
        "ppo/explained_variance": compute_explained_variance(tokens.values_N, returns_N),
        "ppo/return_mean": float(returns_N.mean()),
    }
    if settings.kl_target is not None:
        metrics["rl/kl_beta"] = beta
        num = len(torch.unique(tokens.completions_N))
        kl = metrics["rl/kl_penalty"] / beta if beta else 0.0
        following = compute_next_beta(beta, kl, target=settings.kl_target, horizon=settings.kl_horizon, num_samples=num)
        with torch.no_grad():
            pair.kl_beta.fill_(following)
    advantages_N = whiten(advantages_N) if settings.whiten_advantages else advantages_N
    streams = {"advantages": advantages_N, "returns": returns_N}
    return Credit(streams, average_by_completion(advantages_N, tokens, rollout), metrics)


def load_critic(settings: PPOSettings, context: Context, base: Base) -> Base:
    """The input `critic` (a reward model, or another run's critic), or the base's trunk with a head that says 0; under
    an adapter of its own where the settings give one."""
    critic = load_scalar_learner(
        context,
        context.inputs.get("critic", context.inputs["base"]),
        settings.critic_adapter,
        Head("sequence", num_labels=1, spread=0.0, seed=settings.seed),
        base_folder="critic_base",
    )
    require_same_tokenizer(base.tokenizer, critic.tokenizer, base.name, critic.name)
    return critic


def run(settings: PPOSettings, context: Context) -> StageResult:
    """Train `base` on prompts.jsonl, and a critic beside it."""
    start_stage(settings, context)
    base = load_learner(context, settings)
    critic = load_critic(settings, context, base)
    pair = ActorCritic(base.model, critic.model, settings.kl_beta)
    ledger = new_ledger()
    updates_per_rollout = settings.minibatches * settings.epochs_per_rollout
    rollouts = RolloutSource(
        sampler=build_sampler(settings, context, base, ledger, updates_per_rollout),
        assign=lambda rollout, tokens, _greedy: assign(settings, pair, rollout, tokens),
        minibatches=settings.minibatches,
        reference=load_reference(settings, context, base),
        start=load_start(settings, context, base),
        epochs=settings.epochs_per_rollout,
        score_values=lambda batch: score_values(settings, pair, batch),
    )
    policy_gradient = build_policy_gradient(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_beta=settings.kl_beta if settings.kl_in == "loss" else 0.0,
        normalize="tokens",
        max_completion_tokens=settings.max_new_tokens,
        log_entropy=True,
        importance_cap=settings.importance_cap,
    )
    return train(
        context,
        base,
        PPOSource(rollouts),
        add_value_loss(policy_gradient, settings.value_clip),
        settings,
        ledger,
        temperature=settings.temperature,
        pair=pair,
        critic=critic,
        parts=[
            Part("policy", pair.policy, settings.optimizer),
            Part("critic", pair.critic, settings.critic_optimizer),
        ],
    )


STAGE = Stage(
    "ppo",
    "train",
    PPOSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference", *REWARD_INPUTS, "critic"),
    version=2,
    summary="reinforcement learning by PPO, with a critic",
)
