"""Learning from one's own samples: what every such stage shares.

`Sampler` draws answers, has them judged, counts them and keeps some for people to read. It knows nothing of advantages:
`rollout_source` is built on it for policy gradients.

Shape suffix: R completions of a rollout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.data.examples import Ledger
from polm.data.packing import epoch_order, mix_seed
from polm.data.readers import Prompt, read_prompts
from polm.engine.adapted import find_layout
from polm.engine.checkpoint import list_checkpoints
from polm.engine.device import pick_device, use_bf16
from polm.engine.fit import MetricsLog
from polm.errors import DataError, RecipeError
from polm.recipe import AnswerSettings, SamplingSettings
from polm.recipe_judge import BESIDE
from polm.rewards.base import Reward, Rewarder, RewardItem, Tally
from polm.rewards.judge import Judge, build_judge_rewarder
from polm.rewards.open_backend import open_backend
from polm.rewards.reward_model import load_process_reward_model, load_reward_model
from polm.rewards.sources import build_rewarder
from polm.rollout.answers import sample_answers
from polm.rollout.generate import Completion, Mixture
from polm.stages.common import Base, Context, input_file, model_folder
from polm.text.chat import render_prompt
from polm.tokens import Array, Tree, build_completions

REWARD_INPUTS = ("judge", "reward_model")  # optional inputs of every stage that learns from rewards
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

    `prompts` and `encoded` are the rollout's own; `completions[i].prompt_index` points into them. `update` is the first
    update that learns from it. `tally` is what failed beside single answers.
    """

    update: int
    prompts: Sequence[Prompt]
    encoded: Sequence[Array]
    completions: Sequence[Completion]
    rewards: Sequence[Reward]
    tally: Tally = field(default_factory=Tally)

    @property
    def groups_R(self) -> Array:
        """The prompt of each completion, int64 [R]."""
        return np.array([c.prompt_index for c in self.completions], dtype=np.int64)


SettingsT = TypeVar("SettingsT", bound=SamplingSettings)


@dataclass
class Sampler(Generic[SettingsT]):
    """Draws the answers of a rollout and has them judged: a pure function of (seed, rollout, weights), if the rewarder
    is one."""

    base: Base
    prompts: Sequence[Prompt]
    encoded: Sequence[Array]
    settings: SettingsT
    rewarder: Rewarder
    num_updates: int
    updates_per_rollout: int
    workdir: Path
    resumed: int  # the update from which a killed run goes on
    tally: Tally = field(default_factory=Tally)  # which the rewarder fills
    _logs: dict[str, MetricsLog] = field(default_factory=dict)

    def roll(self, rollout: int, model: PreTrainedModel, *, greedy: bool = False) -> Rollout:
        """Rollout number `rollout`; with `greedy` one answer a prompt, of the likeliest tokens."""
        chosen = self.choose(rollout)
        prompts, encoded = [self.prompts[i] for i in chosen], [self.encoded[i] for i in chosen]
        num, temperature = (1, 0.0) if greedy else (self.settings.samples, self.settings.temperature)
        seed = mix_seed(self.settings.seed, rollout)
        completions = self.draw(encoded, model, seed=seed, num_samples=num, temperature=temperature)
        rewards = judge_completions(self.rewarder, prompts, encoded, completions)
        update = rollout * self.updates_per_rollout
        return Rollout(update, prompts, encoded, completions, rewards, self.tally.take())

    def choose(self, rollout: int) -> list[int]:
        """Indices of the rollout's prompts: a fresh order each time through them all."""
        num = self.settings.prompts_per_rollout
        places = range(rollout * num, (rollout + 1) * num)
        total = len(self.prompts)
        return [int(epoch_order(total, self.settings.seed, p // total)[p % total]) for p in places]

    def draw(
        self,
        encoded: Sequence[Array],
        model: PreTrainedModel,
        *,
        seed: int,
        num_samples: int,
        temperature: float,
        mixture: Mixture | None = None,
    ) -> list[Completion]:
        """Answers to encoded prompts, by the settings where nothing else is given."""
        s = self.settings
        return sample_answers(
            model,
            self.base.tokenizer,
            encoded,
            max_new_tokens=s.max_new_tokens,
            temperature=temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            samples=num_samples,
            seed=seed,
            precision=s.precision,
            mixture=mixture,
        )

    def log(self, rollout: Rollout, more: Mapping[str, Array]) -> None:
        """Whole groups into samples.jsonl, for people to read: some of the first and of the last rollout, one of each
        between them; `more` are numbers of each completion. Into problems.jsonl go answers that were not judged, and
        what failed beside them."""
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
        for status, note in rollout.tally.problems[:NOTED_PROBLEMS]:
            self._open("problems.jsonl").write({"update": rollout.update + 1, **describe_problem(status, note)})
        problems = [i for i, reward in enumerate(rollout.rewards) if not reward.is_judged]
        for i in problems[:NOTED_PROBLEMS]:
            reward, completion = rollout.rewards[i], rollout.completions[i]
            prompt = rollout.prompts[completion.prompt_index]
            problem = describe_problem(reward.status, reward.note, prompt.prompt, completion.text)
            self._open("problems.jsonl").write({"update": rollout.update + 1, **problem})

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
    settings: SettingsT,
    context: Context,
    base: Base,
    ledger: Ledger,
    updates_per_rollout: int,
    rewarder: Rewarder | None = None,
    tally: Tally | None = None,
) -> Sampler[SettingsT]:
    """The sampler over prompts.jsonl of the input `data`, judged by `rewarder` (which fills `tally`), else as the
    settings say.

    Answers and verifiers are asked of the prompts where the verifier is a source of the reward.
    """
    prompts = read_prompts(input_file(context, "data", "prompts.jsonl"), judged="verifier" in settings.reward)
    encoded = [render_prompt(base.tokenizer, [{"role": "user", "content": p.prompt}]) for p in prompts]
    ledger["prompts"] = len(prompts)
    per_epoch = max(1, len(prompts) // settings.prompts_per_rollout) * updates_per_rollout
    num_updates = settings.updates or max(1, round((settings.epochs or 1.0) * per_epoch))
    require_room(encoded, base.max_positions)
    tally = Tally() if tally is None else tally
    sampler = Sampler(
        base=base,
        prompts=prompts,
        encoded=encoded,
        settings=settings,
        rewarder=rewarder or load_rewarder(settings, context, base, tally),
        num_updates=num_updates,
        updates_per_rollout=updates_per_rollout,
        workdir=context.workdir,
        resumed=resume_point(context),
        tally=tally,
    )
    sampler.open_logs()
    return sampler


def load_rewarder(settings: SamplingSettings | AnswerSettings, context: Context, base: Base, tally: Tally) -> Rewarder:
    """What judges the answers. `reward: model` reads the input `reward_model`, a reward model or one of steps;
    `reward: judge` reads the input `judge`, or asks a server. `tally` takes up what fails beside single answers.

    RecipeError where the setting and the input do not go together.
    """
    built: dict[str, Rewarder] = {}
    given = context.inputs.get("reward_model")
    if ("model" in settings.reward) != (given is not None):
        raise RecipeError(
            f"reward is {', '.join(settings.reward)} and the input reward_model is {given or 'not given'}: "
            "`reward: model` and reward_model=FOLDER go together"
        )
    if given is not None:
        name = model_folder(given)
        device = pick_device()
        more: dict[str, Any] = {"device": device, "bf16": use_bf16(settings.precision, device)}
        is_of_steps = find_layout(name) == "token"
        built["model"] = (
            load_process_reward_model(name, **more) if is_of_steps else load_reward_model(name, base.tokenizer, **more)
        )
    judge = load_judge(settings, context, tally)
    if judge is not None:
        built["judge"] = build_judge_rewarder(judge.settings, judge.backend, tally)
    return build_rewarder(settings, built, tally)


def load_judge(settings: SamplingSettings | AnswerSettings, context: Context, tally: Tally) -> Judge | None:
    """The judge that the settings name. A server's replies are kept beside the artifact: a killed run goes on to the
    same bits, and asks nothing twice. A local judge says the same again."""
    source = context.inputs.get("judge")
    if settings.judging is None:
        if source is not None:
            raise RecipeError(f"judge={source} is given, and reward {list(settings.reward)} has no judge; leave it out")
        return None
    backend = open_backend(
        settings.judging.endpoint,
        source,
        role="judge",
        precision=settings.precision,
        replies=context.workdir.parent / BESIDE if settings.judging.endpoint is not None else None,
    )
    return Judge(settings.judging, backend, tally)


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
    if reward.status == "unparsed" and not reward.is_judged:
        row["judged"] = False  # a verifier's is judged: it has the reward 0
    return row | {name: round(float(value), 4) for name, value in more.items()}


def describe_problem(status: str, note: str, prompt: str = "", text: str = "") -> dict[str, str]:
    """A row of problems.jsonl; without a prompt and a text where it belongs to no single answer."""
    return {"status": status, "note": note, "prompt": prompt, "text": text}


def describe_counts(tally: Tally) -> dict[str, float]:
    """What failed beside single answers, as counts among a rollout's metrics."""
    return {f"count/{word}": number for word, number in tally.counts.items()}


def summarise(completions: Sequence[Completion], rewards: Sequence[Judged]) -> dict[str, float]:
    """What a rollout looked like. `rl/reward` is the share of right answers among all where every reward is a verdict,
    else the mean of the rewards that were given; `reward/NAME` the mean of each source where there are several."""
    num = len(completions)
    statuses = Counter(r.status for r in rewards)
    values = [r.value for r in rewards if r.value is not None]
    unparsed = sum(r.status == "unparsed" and r.value is None for r in rewards)  # a function returned None
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
        "rl/unjudged": (num - len(values)) / num,
        "rl/length": float(np.mean(lengths)),
        "rl/cut_off": sum(c.finish == "length" for c in completions) / num,
        "rl/equal_groups": sum(len(found) <= 1 for found in groups.values()) / len(groups),
        "count/samples": num,
        **{f"count/samples_{status}": number for status, number in statuses.items()},
        **({"count/unparsed_unjudged": unparsed} if unparsed else {}),
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


def collect_rewards(rewards: Sequence[Judged]) -> tuple[Tensor, Tensor]:
    """(rewards [R] float32, zero where there is none; whether each was judged [R] bool)."""
    judged_R = torch.tensor([r.value is not None for r in rewards])
    return torch.tensor([r.value or 0.0 for r in rewards], dtype=torch.float32), judged_R


def require_room(prompts: Sequence[Array], context: int) -> None:
    """A prompt without room for an answer is an error now, and not when its turn comes."""
    for number, ids in enumerate(prompts):
        if len(ids) >= context:
            raise DataError(
                f"prompt {number} has {len(ids)} tokens, and the model's context is {context}: no room is left for an "
                "answer; take it out of prompts.jsonl, or train a model with a longer context"
            )


def resume_point(context: Context) -> int:
    """The update from which a killed run goes on (0 for a fresh one)."""
    found = list_checkpoints(context.workdir)
    return int(found[-1].name.rpartition("-")[2]) if found else 0
