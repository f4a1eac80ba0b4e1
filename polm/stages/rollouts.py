"""Learning from one's own samples: what every such stage shares.

`Sampler` draws answers, has them judged, counts them and keeps some for people to read; it knows nothing of advantages.
`RolloutSource` is the batch source of the policy-gradient stages: it packs a rollout, scores it under the models that
the stage needs, and hands the tokens to the stage's `assign`, which gives each its advantage.

Shape suffixes: R completions of a rollout, N target tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.data.examples import Ledger
from polm.data.packing import epoch_order, mix_seed, pack_best_fit
from polm.data.readers import Prompt, read_prompts
from polm.engine.checkpoint import list_checkpoints
from polm.engine.device import sample_in_bf16, use_bf16
from polm.engine.fit import COUNT, MetricsLog
from polm.engine.score import score
from polm.errors import DataError, UserError
from polm.models.loading import count_parameters
from polm.recipe import RolloutSettings
from polm.recipe_judge import BESIDE
from polm.rewards.base import UNJUDGED, Reward, Rewarder, RewardItem
from polm.rewards.judge import build_judge_rewarder
from polm.rewards.open_backend import open_backend
from polm.rewards.sources import build_rewarder
from polm.rollout.generate import Completion, SamplingParams, generate
from polm.signals.kl import compute_kl_k3
from polm.stages.common import Base, Context, input_file, load_base
from polm.text.chat import render_prompt, stop_token_ids
from polm.text.tokenizer import require_same_tokenizer
from polm.tokens import Array, Step, TokenBatch, Tree, build_completions, collate, tree_length

REWARD_INPUTS = ("judge",)  # optional inputs of every stage that learns from rewards
EDGE_GROUPS = 4  # groups of the first and of the last rollout that samples.jsonl keeps
NOTED_PROBLEMS = 20  # unjudged answers of a rollout that problems.jsonl keeps


class Judged(Protocol):
    """What is read of a reward; verdicts have it too."""

    @property
    def status(self) -> str: ...

    @property
    def value(self) -> float | None: ...


@dataclass(frozen=True)
class Rollout:
    """The samples of a rollout with what they earned, in the order of (prompt, sample).

    `prompts` and `encoded` are the rollout's own; `completions[i].prompt_index` points into them.
    """

    update: int
    prompts: Sequence[Prompt]
    encoded: Sequence[Array]
    completions: Sequence[Completion]
    rewards: Sequence[Reward]

    @property
    def groups_R(self) -> Array:
        """The prompt of each completion, int64 [R]."""
        return np.array([c.prompt_index for c in self.completions], dtype=np.int64)


@dataclass
class Sampler:
    """Draws the answers of a rollout and has them judged: a pure function of (seed, rollout, weights), if the rewarder
    is one."""

    base: Base
    prompts: Sequence[Prompt]
    encoded: Sequence[Array]
    settings: RolloutSettings
    rewarder: Rewarder
    num_updates: int
    updates_per_rollout: int
    workdir: Path
    resumed: int  # the update from which a killed run goes on
    _logs: dict[str, MetricsLog] = field(default_factory=dict)

    def roll(self, rollout: int, model: PreTrainedModel, *, greedy: bool = False) -> Rollout:
        """Rollout number `rollout`; with `greedy` one answer a prompt, of the likeliest tokens."""
        chosen = self._choose(rollout)
        prompts, encoded = [self.prompts[i] for i in chosen], [self.encoded[i] for i in chosen]
        completions = self._sample(encoded, rollout, model, greedy)
        rewards = judge_completions(self.rewarder, prompts, encoded, completions)
        return Rollout(rollout * self.updates_per_rollout, prompts, encoded, completions, rewards)

    def _choose(self, rollout: int) -> list[int]:
        """Indices of the rollout's prompts: a fresh order each time through them all."""
        num = self.settings.prompts_per_rollout
        places = range(rollout * num, (rollout + 1) * num)
        total = len(self.prompts)
        return [int(epoch_order(total, self.settings.seed, p // total)[p % total]) for p in places]

    def _sample(self, encoded: Sequence[Array], rollout: int, model: PreTrainedModel, greedy: bool) -> list[Completion]:
        s = self.settings
        params = SamplingParams(
            max_new_tokens=s.max_new_tokens,
            temperature=0.0 if greedy else s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            num_samples=1 if greedy else s.samples,
            seed=mix_seed(s.seed, rollout),
            stop_token_ids=stop_token_ids(self.base.tokenizer),
        )
        bf16 = sample_in_bf16(s.precision, model.device.type, count_parameters(model))
        return generate(model, self.base.tokenizer, encoded, params, bf16=bf16)

    def log(self, rollout: Rollout, more: Mapping[str, Array]) -> None:
        """Whole groups into samples.jsonl, for people to read: some of the first and of the last rollout, one of each
        between them; `more` are numbers of each completion. Answers that were not judged go into problems.jsonl."""
        is_edge = rollout.update == 0 or rollout.update + self.updates_per_rollout >= self.num_updates
        for number in range(min(EDGE_GROUPS if is_edge else 1, len(rollout.prompts))):
            prompt = rollout.prompts[number]
            answers = [
                describe_sample(c, rollout.rewards[i], {name: value[i] for name, value in more.items()})
                for i, c in enumerate(rollout.completions)
                if c.prompt_index == number
            ]
            row = {"update": rollout.update + 1, "prompt": prompt.prompt, "answer": prompt.answer, "samples": answers}
            self._open("samples.jsonl").write(row)
        problems = [i for i, reward in enumerate(rollout.rewards) if reward.status in UNJUDGED]
        for i in problems[:NOTED_PROBLEMS]:
            reward, completion = rollout.rewards[i], rollout.completions[i]
            row = {"update": rollout.update + 1, "status": reward.status, "note": reward.note}
            row |= {"prompt": rollout.prompts[completion.prompt_index].prompt, "text": completion.text}
            self._open("problems.jsonl").write(row)

    def open_logs(self) -> None:
        """Take out what a killed run wrote past its checkpoint; called once, before training."""
        for name in ("samples.jsonl", "problems.jsonl"):
            if name == "samples.jsonl" or (self.workdir / name).is_file():
                self._open(name)

    def _open(self, name: str) -> MetricsLog:
        if name not in self._logs:
            self._logs[name] = MetricsLog(self.workdir / name, self.resumed)
        return self._logs[name]


def build_sampler(
    settings: RolloutSettings, context: Context, base: Base, ledger: Ledger, updates_per_rollout: int
) -> Sampler:
    """The sampler over prompts.jsonl of the input `data`, judged as the settings say.

    Answers and verifiers are asked of the prompts where the verifier is a source of the reward.
    """
    prompts = read_prompts(input_file(context, "data", "prompts.jsonl"), judged="verifier" in settings.reward)
    encoded = [render_prompt(base.tokenizer, [{"role": "user", "content": p.prompt}]) for p in prompts]
    ledger["prompts"] = len(prompts)
    per_epoch = max(1, len(prompts) // settings.prompts_per_rollout) * updates_per_rollout
    num_updates = settings.updates or max(1, round((settings.epochs or 1.0) * per_epoch))
    require_room(encoded, base.max_positions)
    sampler = Sampler(
        base=base,
        prompts=prompts,
        encoded=encoded,
        settings=settings,
        rewarder=build_rewarder(settings, load_rewarders(settings, context)),
        num_updates=num_updates,
        updates_per_rollout=updates_per_rollout,
        workdir=context.workdir,
        resumed=resume_point(context),
    )
    sampler.open_logs()
    return sampler


def load_rewarders(settings: RolloutSettings, context: Context) -> dict[str, Rewarder]:
    """The sources of rewards that are models. A server's replies are kept beside the artifact: a killed run goes on to
    the same bits, and asks nothing twice. A local judge says the same again."""
    source = context.inputs.get("judge")
    if settings.judging is None:
        if source is not None:
            raise UserError(f"judge={source} is given, and reward {list(settings.reward)} has no judge; leave it out")
        return {}
    backend = open_backend(
        settings.judging.endpoint,
        source,
        role="judge",
        precision=settings.precision,
        replies=context.workdir.parent / BESIDE if settings.judging.endpoint is not None else None,
    )
    return {"judge": build_judge_rewarder(settings.judging, backend)}


def judge_completions(
    rewarder: Rewarder, prompts: Sequence[Prompt], encoded: Sequence[Array], completions: Sequence[Completion]
) -> list[Reward]:
    """The reward of each completion, in one call of the rewarder."""
    items = []
    for completion in completions:
        prompt = prompts[completion.prompt_index]
        items.append(
            RewardItem(
                messages=[{"role": "user", "content": prompt.prompt}],
                completion=completion.text,
                prompt_tokens=encoded[completion.prompt_index],
                completion_tokens=completion.tokens,
                fields=prompt.fields,
            )
        )
    return rewarder(items)


def describe_sample(completion: Completion, reward: Reward, more: Mapping[str, Any]) -> dict[str, Any]:
    """One sample of samples.jsonl; a reward that says more than its status is written too."""
    row: dict[str, Any] = {"text": completion.text, "status": reward.status}
    if reward.value is not None and reward.value != float(reward.status == "right"):
        row["reward"] = round(reward.value, 4)
    if reward.note:
        row["note"] = reward.note
    return row | {name: round(float(value), 4) for name, value in more.items()}


def summarise(completions: Sequence[Completion], rewards: Sequence[Judged]) -> dict[str, float]:
    """What a rollout looked like. `rl/reward` is the share of right answers among all where every reward is a verdict,
    else the mean of the rewards that were given; `reward/NAME` the mean of each source where there are several."""
    num = len(completions)
    statuses = Counter(r.status for r in rewards)
    values = [r.value for r in rewards if r.value is not None]
    lengths = [len(c.tokens) for c in completions]
    groups: dict[int, set[float]] = {}
    for completion, reward in zip(completions, rewards, strict=True):
        groups.setdefault(completion.prompt_index, set()).update([] if reward.value is None else [reward.value])
    is_verdict = set(values) <= {0.0, 1.0} and not statuses["scored"]
    return {
        "rl/reward": sum(values) / max(1, num if is_verdict else len(values)),
        **({} if is_verdict else {"rl/right": statuses["right"] / num}),
        **_summarise_parts(rewards),
        "rl/unparsed": statuses["unparsed"] / num,
        "rl/unjudged": sum(statuses[status] for status in UNJUDGED) / num,
        "rl/length": float(np.mean(lengths)),
        "rl/cut_off": sum(c.finish == "length" for c in completions) / num,
        "rl/equal_groups": sum(len(found) <= 1 for found in groups.values()) / len(groups),
        "count/samples": num,
        **{f"count/samples_{status}": number for status, number in statuses.items()},
    }


def _summarise_parts(rewards: Sequence[Judged]) -> dict[str, float]:
    parts = [getattr(reward, "parts", {}) for reward in rewards]
    names = sorted({name for part in parts for name in part})
    return {f"reward/{name}": float(np.mean([part[name] for part in parts if name in part])) for name in names}


def build_rollout_trees(
    prompts: Sequence[Array],
    completions: Sequence[Completion],
    rewards: Sequence[Judged],
    advantages: Array | None = None,
) -> list[Tree]:
    """A prompt with its samples as children; unjudged samples are left out. The mark `completion` of a child is the
    index of its completion; its tokens carry `sampler_logprobs`, and `advantages` [R] where they are given."""
    trees = []
    groups: dict[int, list[int]] = {}
    for i, completion in enumerate(completions):
        if rewards[i].value is not None and len(completion.tokens):
            groups.setdefault(completion.prompt_index, []).append(i)
    for index, mine in sorted(groups.items()):
        streams = [{"sampler_logprobs": completions[i].logprobs.astype(np.float32)} for i in mine]
        if advantages is not None:
            for i, stream in zip(mine, streams, strict=True):
                stream["advantages"] = np.full(len(completions[i].tokens), advantages[i], dtype=np.float32)
        marks = [{"completion": float(i)} for i in mine]
        trees.append(build_completions(prompts[index], [completions[i].tokens for i in mine], streams, marks))
    if not trees:
        notes = Counter(note for reward in rewards if (note := getattr(reward, "note", "")))
        why = f" ({notes.most_common(1)[0][0]})" if notes else ""
        raise DataError(
            f"every sample of a rollout timed out or failed in its verifier or reward{why}; raise time_limit, or "
            "correct the reward"
        )
    return trees


# ---- the source of the policy-gradient stages ----------------------------------------------------------------------


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


Assign = Callable[[Rollout, RolloutTokens, PreTrainedModel], Credit]
Scorer = Callable[[PreTrainedModel, TokenBatch], Tensor]  # values [N] of a batch under the model that is trained


@dataclass
class RolloutSource:
    """Batches made by sampling from the model as it stands. Update u is a pure function of (seed, u, weights),
    given that a run only restarts at the first update of a rollout.

    The groups of a rollout are dealt to `minibatches` parts, each an update; `epochs` times through all of them.
    """

    sampler: Sampler
    assign: Assign
    minibatches: int
    reference: PreTrainedModel | None = None
    start: PreTrainedModel | None = None  # where the distance from the starting model is only measured
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
        credit = self.assign(rollout, collect_tokens(packed), model)
        self._metrics |= credit.metrics
        self._minibatches = spread_streams(packed, credit.streams_N)
        self.sampler.log(rollout, {"advantage": credit.advantages_R})

    def _pack(self, trees: Sequence[Tree], model: PreTrainedModel) -> list[TokenBatch]:
        """Micro-batches of at most `bin_tokens`, with the scores that the stage and its objective will read."""
        if not trees:  # a part of the rollout whose samples were all left out
            return []
        lengths = [tree_length(tree) for tree in trees]
        capacity = max(self.sampler.settings.bin_tokens, max(lengths))
        batches = [collate(trees[i] for i in part) for part in pack_best_fit(lengths, capacity, range(len(trees)))]
        if self.updates_per_rollout > 1:  # with one update, the loss's own scores are those before it
            batches = [self._with_scores(batch, model, "old_logprobs") for batch in batches]
        if self.reference is not None:
            batches = [self._with_scores(batch, self.reference, "ref_logprobs") for batch in batches]
        if self.score_values is not None:
            batches = [add_stream(batch, "old_values", self.score_values(model, batch)) for batch in batches]
        return batches

    @torch.no_grad()
    def _measure_kl(self, trees: Sequence[Tree], start: PreTrainedModel) -> float:
        """KL(policy || start) over the samples of `trees`, nats a token, from the sampler's own log-probabilities."""
        batch = self._with_scores(collate(trees), start, "start_logprobs")
        return float(compute_kl_k3(batch.at_targets("sampler_logprobs"), batch.at_targets("start_logprobs")).mean())

    @torch.no_grad()
    def _with_scores(self, batch: TokenBatch, model: PreTrainedModel, name: str) -> TokenBatch:
        settings = self.sampler.settings
        bf16 = use_bf16(settings.precision, model.device.type)
        scores = score(model, batch.to(model.device), temperature=settings.temperature, bf16=bf16)
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


def collect_rewards(rewards: Sequence[Judged]) -> tuple[Tensor, Tensor]:
    """(rewards [R] float32, zero where there is none; whether each was judged [R] bool)."""
    judged_R = torch.tensor([r.value is not None for r in rewards])
    return torch.tensor([r.value or 0.0 for r in rewards], dtype=torch.float32), judged_R


# ---- what the stages load ------------------------------------------------------------------------------------------


def require_room(prompts: Sequence[Array], context: int) -> None:
    """A prompt without room for an answer is an error now, and not when its turn comes."""
    for number, ids in enumerate(prompts):
        if len(ids) >= context:
            raise DataError(
                f"prompt {number} has {len(ids)} tokens, and the model's context is {context}: no room is left for an "
                "answer; take it out of prompts.jsonl, or train a model with a longer context"
            )


def load_reference(settings: RolloutSettings, context: Context, base: Base) -> PreTrainedModel | None:
    """The model that the KL penalty pulls to: the input `reference`, or the base as it is given."""
    if settings.kl_beta == 0:
        if "reference" in context.inputs:
            raise UserError(
                "a reference is given, but kl_beta is 0 and nothing would read it; set kl_beta, or leave it out"
            )
        return None
    reference = load_base(context.inputs.get("reference", context.inputs["base"]))
    require_same_tokenizer(base.tokenizer, reference.tokenizer, base.name, reference.name)
    return reference.model.eval()


def load_start(settings: RolloutSettings, context: Context) -> PreTrainedModel | None:
    """The model as it was given, where the loss has no KL penalty that would log the distance from it."""
    is_measured = settings.kl_groups > 0 and settings.kl_beta == 0
    return load_base(context.inputs["base"]).model.eval() if is_measured else None


def resume_point(context: Context) -> int:
    """The update from which a killed run goes on (0 for a fresh one)."""
    found = list_checkpoints(context.workdir)
    return int(found[-1].name.rpartition("-")[2]) if found else 0
