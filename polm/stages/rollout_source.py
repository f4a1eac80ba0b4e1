"""The batch source of the policy-gradient stages: packs a rollout, scores it under the models that the stage needs, and
hands its tokens to the stage's `assign`, which gives each an advantage.

Shape suffixes: R completions of a rollout, N target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.data.packing import pack_best_fit
from polm.engine.device import use_bf16
from polm.engine.fit import COUNT
from polm.engine.score import score
from polm.errors import UserError
from polm.recipe import RolloutSettings
from polm.signals.advantages import compute_completion_sum, compute_token_rewards
from polm.signals.kl import compute_kl_k1, compute_kl_k3
from polm.stages.common import (
    Base,
    Context,
    Frozen,
    StageResult,
    load_given,
    load_learner,
    new_ledger,
    start_stage,
    train,
)
from polm.stages.rollouts import Rollout, Sampler, build_rollout_trees, build_sampler, describe_counts, summarise
from polm.tokens import Array, Objective, Step, TokenBatch, Tree, collate, tree_length


@dataclass(frozen=True)
class RolloutTokens:
    """The target tokens of a rollout in one row; those of a completion stand side by side, in order.

    completions_N       int64, index of the completion in the rollout
    sampler_logprobs_N  float32, log p of the generator that drew it
    old_logprobs_N      the same of the trainer, before the first update; None where nobody asked
    ref_logprobs_N      of the reference; None where there is none
    values_N            of the critic, of the text before the token; None where there is none
    """

    completions_N: Tensor
    sampler_logprobs_N: Tensor
    old_logprobs_N: Tensor | None = None
    ref_logprobs_N: Tensor | None = None
    values_N: Tensor | None = None

    @property
    def policy_logprobs_N(self) -> Tensor:
        """log p of the policy that drew the tokens: the trainer's where it was scored, else the generator's."""
        return self.sampler_logprobs_N if self.old_logprobs_N is None else self.old_logprobs_N


@dataclass(frozen=True)
class Credit:
    """What an `assign` gives: streams [N], of which one is `advantages`; a number a completion [R] for samples.jsonl;
    and metrics of the rollout."""

    streams_N: Mapping[str, Tensor]
    advantages_R: Array
    metrics: Mapping[str, Any] = field(default_factory=dict)


# Gives credit to the tokens of a rollout; the last argument decodes its prompts greedily, where that is asked for.
Assign = Callable[[Rollout, RolloutTokens, Callable[[], Rollout]], Credit]
Scorer = Callable[[TokenBatch], Tensor]  # the critic's values [N] of a batch


@dataclass
class RolloutSource:
    """Batches made by sampling from the model as it stands. Update u is a pure function of (seed, u, weights),
    given that a run only restarts at the first update of a rollout.

    The groups of a rollout are dealt to `minibatches` parts, each an update; `epochs` times through all of them.
    """

    sampler: Sampler[RolloutSettings]
    assign: Assign
    minibatches: int
    reference: Frozen | None = None
    start: Frozen | None = None  # where the distance from the starting model is only measured
    epochs: int = 1
    score_values: Scorer | None = None
    _minibatches: list[list[TokenBatch]] = field(default_factory=list)
    _metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def num_updates(self) -> int:
        return self.sampler.num_updates

    @property
    def updates_per_rollout(self) -> int:
        return self.minibatches * self.epochs

    @property
    def reads_weights(self) -> bool:
        return True

    def resumable(self, update: int) -> bool:
        return update % self.updates_per_rollout == 0

    def step(self, update: int, model: PreTrainedModel) -> Step:
        rollout, place = divmod(update, self.updates_per_rollout)
        if place == 0:
            self._roll(rollout, model)
        once = place == 0  # what a rollout measured stands beside each of its updates; its counts are added up once
        metrics = {k: v for k, v in self._metrics.items() if once or not k.startswith(COUNT)}
        return Step(self._minibatches[place % self.minibatches], metrics)

    def _roll(self, number: int, model: PreTrainedModel) -> None:
        rollout = self.sampler.roll(number, model)
        self._metrics = dict(summarise(rollout.completions, rollout.rewards))
        trees = build_rollout_trees(rollout.encoded, rollout.completions, rollout.rewards)
        if self.start is not None:
            self._metrics["rl/kl_start"] = self._measure_kl(trees[: self.sampler.settings.kl_groups], self.start)
        parts = np.array_split(np.arange(len(trees)), self.minibatches)
        packed = [self._pack([trees[i] for i in part], model) for part in parts]

        def decode() -> Rollout:
            greedy = self.sampler.roll(number, model, greedy=True)
            rollout.tally.merge(greedy.tally)
            return greedy

        credit = self.assign(rollout, collect_tokens(packed), decode)
        self._metrics |= {**credit.metrics, **describe_counts(rollout.tally)}
        self._minibatches = spread_streams(packed, credit.streams_N)
        self.sampler.log(rollout, {"advantage": credit.advantages_R})

    def _pack(self, trees: Sequence[Tree], model: PreTrainedModel) -> list[TokenBatch]:
        """Micro-batches of at most `bin_tokens`, with the scores that the stage and its objective will read."""
        batches = collate_bins(trees, self.sampler.settings.bin_tokens)
        if self.updates_per_rollout > 1:  # with one update, the loss's own scores are those before it
            batches = [self._with_scores(batch, Frozen(model), "old_logprobs") for batch in batches]
        if self.reference is not None:
            batches = [self._with_scores(batch, self.reference, "ref_logprobs") for batch in batches]
        if self.score_values is not None:
            batches = [add_stream(batch, "old_values", self.score_values(batch)) for batch in batches]
        return batches

    def _measure_kl(self, trees: Sequence[Tree], start: Frozen) -> float:
        """KL(policy || start) over the samples of `trees`, nats a token, from the sampler's own log-probabilities."""
        batch = self._with_scores(collate(trees), start, "start_logprobs")
        return float(compute_kl_k3(batch.at_targets("sampler_logprobs"), batch.at_targets("start_logprobs")).mean())

    def _with_scores(self, batch: TokenBatch, frozen: Frozen, name: str) -> TokenBatch:
        settings = self.sampler.settings
        return add_scores(batch, name, frozen, settings.precision, settings.temperature)


def collate_bins(trees: Sequence[Tree], bin_tokens: int) -> list[TokenBatch]:
    """Micro-batches of at most `bin_tokens` (of one tree, if it is longer); none for no trees."""
    if not trees:  # a part of a rollout whose samples were all left out
        return []
    lengths = [tree_length(tree) for tree in trees]
    capacity = max(bin_tokens, max(lengths))
    return [collate(trees[i] for i in part) for part in pack_best_fit(lengths, capacity, range(len(trees)))]


def add_scores(batch: TokenBatch, name: str, frozen: Frozen, precision: str, temperature: float) -> TokenBatch:
    """The batch with the log-probabilities of a model at its targets, as the stream `name`."""
    with frozen.asked() as model:
        bf16 = use_bf16(precision, model.device.type)
        scores = score(model, batch.to(model.device), temperature=temperature, bf16=bf16)
    return add_stream(batch, name, scores.logprobs_N)


def add_stream(batch: TokenBatch, name: str, values_N: Tensor) -> TokenBatch:
    """The batch with values at its targets, zero elsewhere."""
    stream = torch.zeros(batch.num_tokens)
    stream[batch.targets_N] = values_N.cpu()
    return batch.with_streams(**{name: stream})


def collect_tokens(packed: Sequence[Sequence[TokenBatch]]) -> RolloutTokens:
    """The target tokens of all micro-batches in one row."""
    batches = [batch for part in packed for batch in part]

    def collect(name: str) -> Tensor | None:
        return torch.cat([b.at_targets(name) for b in batches]) if name in batches[0].streams else None

    sampler_logprobs_N = collect("sampler_logprobs")
    assert sampler_logprobs_N is not None
    return RolloutTokens(
        completions_N=torch.cat([b.marks["completion"][b.target_segments_N].long() for b in batches]),
        sampler_logprobs_N=sampler_logprobs_N,
        old_logprobs_N=collect("old_logprobs"),
        ref_logprobs_N=collect("ref_logprobs"),
        values_N=collect("old_values"),
    )


def spread_streams(packed: Sequence[Sequence[TokenBatch]], streams_N: Mapping[str, Tensor]) -> list[list[TokenBatch]]:
    """The inverse of `collect_tokens`: streams over the row of all tokens, back to the micro-batches."""
    out: list[list[TokenBatch]] = []
    first = 0
    for part in packed:
        done = []
        for batch in part:
            last = first + batch.num_targets
            for name, values_N in streams_N.items():
                batch = add_stream(batch, name, values_N[first:last])
            done.append(batch)
            first = last
        out.append(done)
    return out


def describe_kl(tokens: RolloutTokens, kl_R: Tensor, beta: float) -> dict[str, float]:
    """Metrics of a KL penalty in the reward: `rl/kl` (k3, nats a token) and `rl/kl_penalty` (what it takes off an
    answer's reward). kl_R is the sum of k1 over the tokens of each answer that was judged."""
    assert tokens.ref_logprobs_N is not None
    kl_N = compute_kl_k3(tokens.policy_logprobs_N, tokens.ref_logprobs_N)
    return {"rl/kl": float(kl_N.mean()), "rl/kl_penalty": float(beta * kl_R.mean())}


def build_token_rewards(rewards_R: Tensor, tokens: RolloutTokens, beta: float) -> tuple[Tensor, dict[str, Any]]:
    """(rewards of the tokens [N]: the answer's at its last one, less beta times log p - log p_ref at each; metrics)."""
    if tokens.ref_logprobs_N is None or beta == 0.0:
        nothing_N = torch.zeros(len(tokens.completions_N))
        return compute_token_rewards(rewards_R, nothing_N, tokens.completions_N, 0.0), {}
    kl_N = compute_kl_k1(tokens.policy_logprobs_N, tokens.ref_logprobs_N)
    kl_R = compute_completion_sum(kl_N, tokens.completions_N, len(rewards_R))
    metrics = describe_kl(tokens, kl_R[torch.unique(tokens.completions_N)], beta)
    return compute_token_rewards(rewards_R, kl_N, tokens.completions_N, beta), metrics


def average_by_completion(values_N: Tensor, tokens: RolloutTokens, rollout: Rollout) -> Array:
    """The mean over the tokens of each completion, [R]; 0 for one without tokens in the row."""
    num = len(rollout.completions)
    sums_R = compute_completion_sum(values_N, tokens.completions_N, num)
    found: Array = (sums_R / torch.bincount(tokens.completions_N, minlength=num).clamp(min=1)).numpy()
    return found


def train_on_rollouts(
    settings: RolloutSettings, context: Context, assign: Assign, objective: Objective, minibatches: int
) -> StageResult:
    """Train `base` on prompts.jsonl, each rollout once in `minibatches` updates."""
    start_stage(settings, context)
    base = load_learner(context, settings)
    ledger = new_ledger()
    source = RolloutSource(
        sampler=build_sampler(settings, context, base, ledger, minibatches),
        assign=assign,
        minibatches=minibatches,
        reference=load_reference(settings, context, base),
        start=load_start(settings, context, base),
    )
    return train(context, base, source, objective, settings, ledger, temperature=settings.temperature)


def load_reference(settings: RolloutSettings, context: Context, base: Base) -> Frozen | None:
    """The model that the KL penalty pulls to: the input `reference`, or the base as it is given."""
    if settings.kl_beta == 0:
        if "reference" in context.inputs:
            raise UserError(
                "a reference is given, but kl_beta is 0 and nothing would read it; set kl_beta, or leave it out"
            )
        return None
    return load_given(context, base, "reference")


def load_start(settings: RolloutSettings, context: Context, base: Base) -> Frozen | None:
    """The model as it was given, where the loss has no KL penalty that would log the distance from it."""
    is_measured = settings.kl_groups > 0 and settings.kl_beta == 0
    return load_given(context, base) if is_measured else None
