"""`polm online`: preference optimisation on answers of the policy as it stands (online DPO, XPO, Nash-MD).

Each update draws answers to its prompts, has them judged, and learns from the preferences between them. Whom an answer
is held against is the method's choice: another of the policy's own (dpo), one of the reference (xpo), or one of the
geometric mixture of both (nash_md). With a mixture dpo draws all of its answers from it (IPO-MD).

Shape suffix: R completions of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from polm.data.packing import mix_seed
from polm.objectives.online import build_nash_md, build_xpo
from polm.objectives.preference import Knobs, build_preference
from polm.objectives.sampler_gap import log_sampler_gap
from polm.recipe_online import OnlineSettings
from polm.rewards.base import Rewarder, Tally
from polm.rewards.rank import compute_preference, reward_by_rank
from polm.rollout.generate import Completion, Mixture
from polm.stages.common import (
    Base,
    Context,
    Frozen,
    Stage,
    StageResult,
    load_base,
    load_given,
    load_learner,
    new_ledger,
    start_stage,
    train,
)
from polm.stages.rollout_source import add_scores, collate_bins
from polm.stages.rollouts import (
    REWARD_INPUTS,
    Rollout,
    Sampler,
    build_sampler,
    describe_counts,
    judge_completions,
    load_judge,
    summarise,
)
from polm.text.tokenizer import require_same_tokenizer
from polm.tokens import Objective, Step, Tree, build_completions

OTHER = 1  # added to a rollout's seed where the reference or the mixture draws: its numbers must not be the policy's


@dataclass(frozen=True)
class Match:
    """Two answers to a prompt, by their places in the rollout, with the probability that the first is better."""

    first: int
    second: int
    preference: float


@dataclass
class OnlineSource:
    """Batches of fresh preferences; update u is a pure function of (seed, u, weights), if the rewarder is one."""

    sampler: Sampler[OnlineSettings]
    reference: Frozen

    @property
    def num_updates(self) -> int:
        return self.sampler.num_updates

    @property
    def reads_weights(self) -> bool:
        return True

    def resumable(self, update: int) -> bool:
        del update
        return True

    def step(self, update: int, model: PreTrainedModel) -> Step:
        settings = self.sampler.settings
        rollout, num_own = self._roll(update, model)
        matches, counts = find_matches(rollout, num_own, settings)
        metrics = measure(rollout, num_own, matches, counts) | describe_counts(rollout.tally)
        own_R = np.array([c.sample_index < num_own for c in rollout.completions], dtype=np.float32)
        self.sampler.log(rollout, {} if settings.method == "dpo" else {"own": own_R})
        build = build_answer_trees if settings.method == "nash_md" else build_pair_trees
        trees = build(rollout, num_own, matches, is_comparable(settings))
        batches = collate_bins(trees, settings.bin_tokens)  # none: the update changes nothing
        more = (self.reference, settings.precision, score_temperature(settings))
        return Step([add_scores(batch, "ref_logprobs", *more) for batch in batches], metrics)

    def _roll(self, update: int, model: PreTrainedModel) -> tuple[Rollout, int]:
        """The judged answers, and how many of each prompt's are the policy's: they come first."""
        settings, sampler = self.sampler.settings, self.sampler
        chosen = sampler.choose(update)
        prompts, encoded = [sampler.prompts[i] for i in chosen], [sampler.encoded[i] for i in chosen]
        num_own = settings.samples if settings.method == "dpo" else settings.samples // 2
        draw = partial(sampler.draw, encoded, num_samples=num_own, temperature=settings.temperature)
        mixture = Mixture(self.reference.model, settings.mixture) if settings.mixture else None
        seeds = mix_seed(settings.seed, update), mix_seed(settings.seed, update, OTHER)
        if settings.method == "dpo":
            completions = draw(model, seed=seeds[0], mixture=mixture)
        else:
            own = draw(model, seed=seeds[0])
            if settings.method == "xpo":
                with self.reference.asked() as reference:
                    others = draw(reference, seed=seeds[1])
            else:
                others = draw(model, seed=seeds[1], mixture=mixture)
            completions = merge_completions(own, others, num_own)
        rewards = judge_completions(sampler.rewarder, prompts, encoded, completions)
        return Rollout(update, prompts, encoded, completions, rewards, sampler.tally.take()), num_own


def merge_completions(own: Sequence[Completion], others: Sequence[Completion], num_own: int) -> list[Completion]:
    """The answers of both, in the order of (prompt, sample): of each prompt the policy's first."""
    moved = [replace(c, sample_index=c.sample_index + num_own) for c in others]
    return sorted([*own, *moved], key=lambda c: (c.prompt_index, c.sample_index))


def find_matches(rollout: Rollout, num_own: int, settings: OnlineSettings) -> tuple[list[Match], dict[str, int]]:
    """The comparisons of a rollout that say something, and how many there were of each other kind.

    dpo: the best of a prompt's answers against the worst. xpo, nash_md: each of the policy's against one of the other
    side. `unjudged`: an answer has no reward, or no token. `ties`: equal rewards. A tie teaches dpo and xpo nothing;
    to nash_md it is the preference 1/2, under which its pull to the reference still acts, so there it is counted and
    kept.
    """
    matches: list[Match] = []
    counts = {"matches": 0, "ties": 0, "unjudged": 0}
    keeps_ties = settings.method == "nash_md"
    for first, second in _propose(rollout, num_own, settings):
        counts["matches"] += 1
        if not (_is_judged(rollout, first) and _is_judged(rollout, second)):
            counts["unjudged"] += 1
            continue
        difference = _value(rollout, first) - _value(rollout, second)
        counts["ties"] += difference == 0
        if difference != 0 or keeps_ties:
            if settings.compare == "judge":  # the rewards are the preference and what it leaves
                preference = (1.0 + difference) / 2.0
            else:
                preference = compute_preference(difference, settings.preference_temperature or 0.0)
            matches.append(Match(first, second, preference))
    return matches, counts


def _propose(rollout: Rollout, num_own: int, settings: OnlineSettings) -> list[tuple[int, int]]:
    """Who meets whom: indices of completions, two a match."""
    size = settings.samples
    starts = range(0, len(rollout.completions), size)
    if settings.method != "dpo":
        return [(start + i, start + num_own + i) for start in starts for i in range(num_own)]
    out = []
    for start in starts:
        group = range(start, start + size)
        fit = [i for i in group if _is_judged(rollout, i)] or list(group)
        if len(fit) == 1:  # against one that was not judged, so that it is counted
            fit = [fit[0], next(i for i in group if i != fit[0])]
        judged = all(_is_judged(rollout, i) for i in fit)
        if judged:
            fit.sort(key=lambda i: -_value(rollout, i))  # of equal ones the earlier
        out.append((fit[0], fit[-1]))
    return out


def _is_judged(rollout: Rollout, index: int) -> bool:
    return rollout.rewards[index].value is not None and len(rollout.completions[index].tokens) > 0


def _value(rollout: Rollout, index: int) -> float:
    value = rollout.rewards[index].value
    assert value is not None
    return value


def build_pair_trees(rollout: Rollout, num_own: int, matches: Sequence[Match], comparable: bool = False) -> list[Tree]:
    """A tree a match: the prompt with the chosen answer (mark sign 1) and the rejected one (sign -1); an answer of the
    reference has the mark `explored`. With `comparable` the policy's own carry their `sampler_logprobs`, the others
    NaN."""
    trees = []
    for match in matches:
        order = (match.first, match.second) if match.preference > 0.5 else (match.second, match.first)
        answers = [rollout.completions[i] for i in order]
        marks, streams = [], []
        for sign, answer in zip((1.0, -1.0), answers, strict=True):
            is_other = answer.sample_index >= num_own
            marks.append({"sign": sign, "explored": 1.0} if is_other else {"sign": sign})
            logprobs = np.full(len(answer.tokens), np.nan, np.float32) if is_other else answer.logprobs
            streams.append({"sampler_logprobs": logprobs})
        prompt = rollout.encoded[answers[0].prompt_index]
        trees.append(build_completions(prompt, [a.tokens for a in answers], streams if comparable else None, marks))
    return trees


def build_answer_trees(
    rollout: Rollout, num_own: int, matches: Sequence[Match], comparable: bool = False
) -> list[Tree]:
    """A tree a prompt: the policy's answers, each with the mark `preference` over the one that it met, and with
    `comparable` their `sampler_logprobs`."""
    del num_own
    groups: dict[int, list[Match]] = {}
    for match in matches:
        groups.setdefault(rollout.completions[match.first].prompt_index, []).append(match)
    trees = []
    for prompt, mine in groups.items():
        answers = [rollout.completions[m.first] for m in mine]
        streams = [{"sampler_logprobs": answer.logprobs} for answer in answers] if comparable else None
        marks = [{"preference": m.preference} for m in mine]
        trees.append(build_completions(rollout.encoded[prompt], [a.tokens for a in answers], streams, marks))
    return trees


def measure(rollout: Rollout, num_own: int, matches: Sequence[Match], counts: dict[str, int]) -> dict[str, float]:
    """What the update looked like: `rl/` of the policy's own answers, `online/` of the comparisons."""
    own = [i for i, c in enumerate(rollout.completions) if c.sample_index < num_own]
    others = [i for i, c in enumerate(rollout.completions) if c.sample_index >= num_own]
    metrics = summarise([rollout.completions[i] for i in own], [rollout.rewards[i] for i in own])
    total = counts["matches"]
    metrics |= {"online/ties": counts["ties"] / total, "online/unjudged": counts["unjudged"] / total}
    judged = total - counts["unjudged"]
    if others and judged:
        left_out = judged - len(matches)  # ties, which count half
        metrics["online/win_rate"] = (sum(m.preference for m in matches) + 0.5 * left_out) / judged
    values = [value for i in others if (value := rollout.rewards[i].value) is not None]
    if values:
        metrics["online/other_reward"] = sum(values) / len(values)
    return {**metrics, **{f"count/online_{name}": number for name, number in counts.items()}}


def score_temperature(settings: OnlineSettings) -> float:
    """Policy and reference are scored as they were sampled where the gradient is that of the sampling (nash_md); a loss
    of pairs is one of the models themselves, however the pairs came about."""
    return settings.temperature if settings.method == "nash_md" else 1.0


def is_comparable(settings: OnlineSettings) -> bool:
    """Whether the log-probabilities of the loss are those that the generator drew the policy's answers with: not at
    another temperature, and not where a mixture drew all of them."""
    from_mixture = settings.method == "dpo" and bool(settings.mixture)
    return settings.temperature == score_temperature(settings) and not from_mixture


def build_objective(settings: OnlineSettings) -> Objective:
    """The loss of the method; it logs how far the generator's log-probabilities are from its own."""
    loss, knobs = settings.loss or "sigmoid", Knobs(beta=settings.beta)
    if settings.method == "nash_md":
        objective = build_nash_md(settings.beta)
    elif settings.method == "xpo":
        objective = build_xpo(loss, knobs, settings.alpha or 0.0)
    else:
        objective = build_preference(loss, knobs)
    return log_sampler_gap(objective)


def load_comparer(settings: OnlineSettings, context: Context, tally: Tally) -> Rewarder | None:
    """The judge that compares answers two by two, where the settings say so: the answers that meet later."""
    if settings.compare == "rewards":
        return None
    judge = load_judge(settings, context, tally)
    assert judge is not None
    return reward_by_rank(judge.rank, settings.samples)


def load_reference(settings: OnlineSettings, context: Context, base: Base) -> Frozen:
    """The input `reference`, or the base as it is given. A mixture asks it beside the learner in one call, so there it
    is a copy of its own also where the learner is an adapter on it."""
    if not settings.mixture:
        return load_given(context, base, "reference")
    reference = load_base(context.inputs.get("reference", context.inputs["base"]))
    require_same_tokenizer(base.tokenizer, reference.tokenizer, base.name, reference.name)
    return Frozen(reference.model.eval())


def run(settings: OnlineSettings, context: Context) -> StageResult:
    """Train `base` on prompts.jsonl. The reference is `base` as it is given, or the input `reference`."""
    start_stage(settings, context)
    base = load_learner(context, settings)
    ledger, tally = new_ledger(), Tally()
    sampler = build_sampler(settings, context, base, ledger, 1, load_comparer(settings, context, tally), tally)
    source = OnlineSource(sampler, load_reference(settings, context, base))
    temperature = score_temperature(settings)
    return train(context, base, source, build_objective(settings), settings, ledger, temperature=temperature)


STAGE = Stage(
    "online",
    "train",
    OnlineSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference", *REWARD_INPUTS),
    version=2,
    summary="online preference optimisation (online DPO, XPO, Nash-MD)",
)
