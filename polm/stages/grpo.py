"""`polm grpo`: reinforcement learning with verifiable rewards and group-relative advantages.

The rollouts, verdicts and advantages live in the batch source; the loop and the objective see streams only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from polm.data.packing import epoch_order, mix_seed, pack_best_fit
from polm.data.readers import Prompt, read_prompts
from polm.engine.checkpoint import list_checkpoints
from polm.engine.device import sample_in_bf16, use_bf16
from polm.engine.fit import COUNT, MetricsLog
from polm.engine.score import score
from polm.errors import DataError, UserError
from polm.models.loading import count_parameters
from polm.objectives.policy_gradient import build_policy_gradient
from polm.recipe import GRPOSettings
from polm.rewards.verify import Verdict, VerifyItem, verify_many
from polm.rollout.generate import Completion, SamplingParams, generate
from polm.signals.advantages import compute_group_advantages
from polm.signals.kl import compute_kl_k3
from polm.stages.common import (
    Base,
    Context,
    Frozen,
    Stage,
    StageResult,
    input_file,
    load_given,
    load_learner,
    new_ledger,
    start_stage,
    train,
)
from polm.text.chat import render_prompt, stop_token_ids
from polm.tokens import Array, Step, TokenBatch, Tree, build_completions, collate, tree_length

EDGE_GROUPS = 4  # groups of the first and of the last rollout that samples.jsonl keeps


@dataclass
class RolloutSource:
    """Batches made by sampling from the model as it stands. Update u is a pure function of (seed, u, weights),
    given that a run only restarts at the first update of a rollout."""

    base: Base
    reference: Frozen | None
    start: Frozen | None  # where the distance from the starting model is only measured
    prompts: Sequence[Prompt]
    encoded: Sequence[Array]
    settings: GRPOSettings
    num_updates: int
    samples_log: MetricsLog
    _minibatches: list[list[TokenBatch]] = field(default_factory=list)
    _metrics: dict[str, float] = field(default_factory=dict)

    def resumable(self, update: int) -> bool:
        return update % self.settings.updates_per_rollout == 0

    def step(self, update: int, model: PreTrainedModel) -> Step:
        rollout, minibatch = divmod(update, self.settings.updates_per_rollout)
        if minibatch == 0:
            self._roll(rollout, update, model)
        once = minibatch == 0  # what a rollout measured stands beside each of its updates; its counts are added up once
        metrics = {k: v for k, v in self._metrics.items() if once or not k.startswith(COUNT)}
        return Step(self._minibatches[minibatch], metrics)

    def _roll(self, rollout: int, update: int, model: PreTrainedModel) -> None:
        chosen = self._choose(rollout)
        completions = self._sample(chosen, rollout, model)
        items = [
            VerifyItem(p.verifier, c.text, p.answer, p.numbers)
            for c in completions
            for p in [self.prompts[chosen[c.prompt_index]]]
        ]
        verdicts = verify_many(items, seconds=self.settings.time_limit)
        advantages = compute_advantages(completions, verdicts, len(chosen), self.settings.advantage_scale)
        self._metrics = summarise(completions, verdicts, advantages)
        self._log_samples(update, chosen, completions, verdicts, advantages)
        trees = build_rollout_trees([self.encoded[i] for i in chosen], completions, verdicts, advantages)
        if self.start is not None:
            self._metrics["rl/kl_start"] = self._measure_kl(trees[: self.settings.kl_groups], self.start)
        parts = np.array_split(np.arange(len(trees)), self.settings.updates_per_rollout)
        self._minibatches = [self._pack([trees[i] for i in part], model) for part in parts]

    def _choose(self, rollout: int) -> list[int]:
        """Indices of the rollout's prompts: a fresh order each time through them all."""
        num = self.settings.prompts_per_rollout
        places = range(rollout * num, (rollout + 1) * num)
        total = len(self.prompts)
        return [int(epoch_order(total, self.settings.seed, p // total)[p % total]) for p in places]

    def _sample(self, chosen: Sequence[int], rollout: int, model: PreTrainedModel) -> list[Completion]:
        s = self.settings
        params = SamplingParams(
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            num_samples=s.samples,
            seed=mix_seed(s.seed, rollout),
            stop_token_ids=stop_token_ids(self.base.tokenizer),
        )
        bf16 = sample_in_bf16(s.precision, model.device.type, count_parameters(model))
        return generate(model, self.base.tokenizer, [self.encoded[i] for i in chosen], params, bf16=bf16)

    def _pack(self, trees: Sequence[Tree], model: PreTrainedModel) -> list[TokenBatch]:
        """Micro-batches of at most `bin_tokens`, with the scores that the objective will compare against."""
        if not trees:  # a part of the rollout whose samples were all left out
            return []
        lengths = [tree_length(tree) for tree in trees]
        capacity = max(self.settings.bin_tokens, max(lengths))
        batches = [collate(trees[i] for i in part) for part in pack_best_fit(lengths, capacity, range(len(trees)))]
        if self.settings.updates_per_rollout > 1:
            batches = [self._with_scores(batch, Frozen(model), "old_logprobs") for batch in batches]
        if self.reference is not None:
            batches = [self._with_scores(batch, self.reference, "ref_logprobs") for batch in batches]
        return batches

    def _measure_kl(self, trees: Sequence[Tree], start: Frozen) -> float:
        """KL(policy || start) over the samples of `trees`, nats a token, from the sampler's own log-probabilities."""
        batch = self._with_scores(collate(trees), start, "start_logprobs")
        return float(compute_kl_k3(batch.at_targets("sampler_logprobs"), batch.at_targets("start_logprobs")).mean())

    def _with_scores(self, batch: TokenBatch, frozen: Frozen, name: str) -> TokenBatch:
        bf16 = use_bf16(self.settings.precision, frozen.model.device.type)
        with frozen.asked() as model:
            scores = score(model, batch.to(model.device), temperature=self.settings.temperature, bf16=bf16)
        stream = torch.zeros(batch.num_tokens)
        stream[batch.targets_N] = scores.logprobs_N.cpu()
        return batch.with_streams(**{name: stream})

    def _log_samples(
        self,
        update: int,
        chosen: Sequence[int],
        completions: Sequence[Completion],
        verdicts: Sequence[Verdict],
        advantages: Array,
    ) -> None:
        """Whole groups, for people to read: some of the first and of the last rollout, one of each between them."""
        is_edge = update == 0 or update + self.settings.updates_per_rollout >= self.num_updates
        for number in range(min(EDGE_GROUPS if is_edge else 1, len(chosen))):
            prompt = self.prompts[chosen[number]]
            answers = [
                {"text": c.text, "status": verdicts[i].status, "advantage": round(float(advantages[i]), 4)}
                for i, c in enumerate(completions)
                if c.prompt_index == number
            ]
            row = {"update": update + 1, "prompt": prompt.prompt, "answer": prompt.answer, "samples": answers}
            self.samples_log.write(row)


def compute_advantages(
    completions: Sequence[Completion], verdicts: Sequence[Verdict], num_groups: int, scale: str
) -> Array:
    """Group-relative advantages [R]. A time-out or an error is no evidence: it is left out of its group's mean and
    gets advantage 0; an answer that cannot be parsed earns no reward, as a wrong one."""
    judged = np.array([v.status in ("right", "wrong", "unparsed") for v in verdicts])
    rewards = np.array([float(v.status == "right") for v in verdicts], dtype=np.float32)
    groups = np.array([c.prompt_index for c in completions])
    advantages = np.zeros(len(completions), dtype=np.float32)
    if judged.any():
        values = compute_group_advantages(
            torch.from_numpy(rewards[judged]),
            torch.from_numpy(groups[judged]),
            scale=scale,  # type: ignore[arg-type]
        )
        advantages[judged] = values.numpy()
    assert groups.max() < num_groups
    return advantages


def build_rollout_trees(
    prompts: Sequence[Array], completions: Sequence[Completion], verdicts: Sequence[Verdict], advantages: Array
) -> list[Tree]:
    """A prompt with its samples as children; unjudged samples are left out."""
    trees = []
    groups: dict[int, list[int]] = {}
    for i, completion in enumerate(completions):
        if verdicts[i].status not in ("timeout", "error") and len(completion.tokens):
            groups.setdefault(completion.prompt_index, []).append(i)
    for index, mine in sorted(groups.items()):
        prompt = prompts[index]
        streams = [
            {
                "advantages": np.full(len(completions[i].tokens), advantages[i], dtype=np.float32),
                "sampler_logprobs": completions[i].logprobs.astype(np.float32),
            }
            for i in mine
        ]
        trees.append(build_completions(prompt, [completions[i].tokens for i in mine], streams))
    if not trees:
        raise DataError("every sample of a rollout timed out or failed in its verifier; raise time_limit")
    return trees


def summarise(completions: Sequence[Completion], verdicts: Sequence[Verdict], advantages: Array) -> dict[str, float]:
    """What a rollout looked like."""
    num = len(completions)
    statuses = Counter(v.status for v in verdicts)
    lengths = [len(c.tokens) for c in completions]
    groups: dict[int, bool] = {}
    for completion, advantage in zip(completions, advantages, strict=True):
        groups[completion.prompt_index] = groups.get(completion.prompt_index, False) or bool(advantage != 0)
    return {
        "rl/reward": statuses["right"] / num,
        "rl/unparsed": statuses["unparsed"] / num,
        "rl/unjudged": (statuses["timeout"] + statuses["error"]) / num,
        "rl/length": float(np.mean(lengths)),
        "rl/cut_off": sum(c.finish == "length" for c in completions) / num,
        "rl/equal_groups": 1.0 - sum(groups.values()) / len(groups),
        "count/samples": num,
        **{f"count/samples_{status}": number for status, number in statuses.items()},
    }


def run(settings: GRPOSettings, context: Context) -> StageResult:
    """Train `base` on prompts.jsonl."""
    start_stage(settings, context)
    base = load_learner(context, settings)
    prompts = read_prompts(input_file(context, "data", "prompts.jsonl"))
    encoded = [render_prompt(base.tokenizer, [{"role": "user", "content": p.prompt}]) for p in prompts]
    ledger = new_ledger()
    ledger["prompts"] = len(prompts)
    per_epoch = max(1, len(prompts) // settings.prompts_per_rollout) * settings.updates_per_rollout
    num_updates = settings.updates or max(1, round((settings.epochs or 1.0) * per_epoch))
    require_room(encoded, base.max_positions)
    source = RolloutSource(
        base=base,
        reference=load_reference(settings, context, base),
        start=load_start(settings, context, base),
        prompts=prompts,
        encoded=encoded,
        settings=settings,
        num_updates=num_updates,
        samples_log=MetricsLog(context.workdir / "samples.jsonl", resume_point(context)),
    )
    objective = build_policy_gradient(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_beta=settings.kl_beta,
        normalize=settings.normalize,
        max_completion_tokens=settings.max_new_tokens,
        log_entropy=True,
    )
    return train(context, base, source, objective, settings, ledger, temperature=settings.temperature)


def require_room(prompts: Sequence[Array], context: int) -> None:
    """A prompt without room for an answer is an error now, and not when its turn comes."""
    for number, ids in enumerate(prompts):
        if len(ids) >= context:
            raise DataError(
                f"prompt {number} has {len(ids)} tokens, and the model's context is {context}: no room is left for an "
                "answer; take it out of prompts.jsonl, or train a model with a longer context"
            )


def load_reference(settings: GRPOSettings, context: Context, base: Base) -> Frozen | None:
    """The model that the KL penalty pulls to: the input `reference`, or the base as it is given."""
    if settings.kl_beta == 0:
        if "reference" in context.inputs:
            raise UserError(
                "a reference is given, but kl_beta is 0 and nothing would read it; set kl_beta, or leave it out"
            )
        return None
    return load_given(context, base, "reference")


def load_start(settings: GRPOSettings, context: Context, base: Base) -> Frozen | None:
    """The model as it was given, where the loss has no KL penalty that would log the distance from it."""
    is_measured = settings.kl_groups > 0 and settings.kl_beta == 0
    return load_given(context, base) if is_measured else None


def resume_point(context: Context) -> int:
    """The update from which a killed run goes on (0 for a fresh one)."""
    found = list_checkpoints(context.workdir)
    return int(found[-1].name.rpartition("-")[2]) if found else 0


STAGE = Stage(
    "grpo",
    "train",
    GRPOSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference",),
    version=2,
    summary="reinforcement learning with verifiable rewards",
)
