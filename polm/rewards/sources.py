"""The rewarder that a stage's settings name: one source of rewards, or several with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from polm.data.benchmarks import parse_plain_number
from polm.errors import UserError
from polm.recipe_rewards import RewardSettings
from polm.rewards.base import Reward, Rewarder, RewardItem, RewardStatus, Tally
from polm.rewards.function import build_function_rewarder
from polm.rewards.verify import Verdict, VerifyItem, verify_many

NO_SOURCES: Mapping[str, Rewarder] = MappingProxyType({})


def build_rewarder(
    settings: RewardSettings, built: Mapping[str, Rewarder] = NO_SOURCES, tally: Tally | None = None
) -> Rewarder:
    """What judges the answers of a stage. `built` holds the sources that are models (by their name in `reward`), which
    a stage loads from its inputs. `tally` takes up what fails and belongs to no single answer.

    With one source its rewards are taken as they are. With several see `combine`.
    """
    sources = {str(name): built.get(name) or _build_source(name, settings, tally) for name in settings.reward}
    if len(sources) == 1 and not settings.reward_weights:
        return next(iter(sources.values()))
    return partial(combine, sources, {str(name): weight for name, weight in settings.reward_weights.items()})


def _build_source(name: str, settings: RewardSettings, tally: Tally | None) -> Rewarder:
    if name == "verifier":
        return partial(judge_by_verifier, seconds=settings.time_limit, partial_reward=settings.partial_reward)
    assert settings.reward_function is not None
    return build_function_rewarder(
        settings.reward_function, seconds=settings.time_limit, batch_seconds=settings.batch_limit, tally=tally
    )


def judge_by_verifier(items: Sequence[RewardItem], *, seconds: float, partial_reward: float = 0.0) -> list[Reward]:
    """1 for a right answer, 0 for a wrong one and for one in which no answer is found.

    With `partial_reward` a wrong answer that is a number earns so much (ReFT, arXiv 2401.08967, section 3.2: 0.1).
    """
    verdicts = verify_many(
        [VerifyItem(i.fields["verifier"], i.completion, i.fields["answer"], i.fields.get("numbers")) for i in items],
        seconds=seconds,
    )
    return [
        Reward(partial_reward, "wrong")
        if partial_reward and verdict.status == "wrong" and is_number(verdict, item.fields["verifier"])
        else Reward(verdict.value, verdict.status)
        for item, verdict in zip(items, verdicts, strict=True)
    ]


def is_number(verdict: Verdict, verifier: str) -> bool:
    """Whether the answer that was judged is a number (an expression has been worked out to one)."""
    return verifier == "expression" or parse_plain_number(verdict.extracted) is not None


def combine(sources: Mapping[str, Rewarder], weights: Mapping[str, float], items: Sequence[RewardItem]) -> list[Reward]:
    """The weighted sum of several rewards (weight 1 where none is given).

    An answer that one of them could not judge is not judged: half a sum would be no evidence. The status is the first
    source's that gives a verdict (right, wrong, unparsed), else `scored`; `parts` holds what each source gave.
    """
    found = {name: rewarder(items) for name, rewarder in sources.items()}
    for name, rewards in found.items():
        if len(rewards) != len(items):
            raise UserError(f"reward source {name}: {len(rewards)} rewards for {len(items)} answers")
    return [_add({name: rewards[i] for name, rewards in found.items()}, weights) for i in range(len(items))]


def _add(parts: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    values = {name: part.value for name, part in parts.items() if part.value is not None}
    note = "; ".join(f"{name}: {part.note}" for name, part in parts.items() if part.note)
    unjudged = next((part for part in parts.values() if not part.is_judged), None)
    if unjudged is not None:
        return replace(unjudged, note=note, parts=values)
    total = sum(weights.get(name, 1.0) * value for name, value in values.items())
    status: RewardStatus = next((p.status for p in parts.values() if p.status != "scored"), "scored")
    return Reward(total, status, note, values)
