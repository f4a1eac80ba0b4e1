"""Rewards from reward models and process reward models: checkpoints that score what a policy wrote.

A reward model reads the policy's own tokens where both have one tokenizer and chat template; otherwise the text is
rendered again with its own. A process reward model always reads the text, step by step. Answers to one prompt share
its computation, and answers of like length share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.data.examples import cut_padding, encode_answers, weigh_end
from polm.data.steps import build_step_tree, encode_separator, encode_steps, split_steps
from polm.engine.adapted import load_classifier, load_own_tokenizer
from polm.engine.annotate import compute_tree_values
from polm.errors import DataError, ModelError
from polm.models.heads import SEPARATOR_FIELD
from polm.models.virtual import read_virtual
from polm.rewards.base import Reward, RewardItem
from polm.text.chat import render_chat, render_prompt, stop_token_ids
from polm.text.tokenizer import fingerprint_tokenizer
from polm.tokens import Array, Tree, build_completions, tree_length

Aggregate = Literal["min", "product", "last"]
BIN_TOKENS = 8192
PROBE: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True)
class RewardModel:
    """Scores whole answers by the value at their last token; a `Rewarder`. Build it with `load_reward_model`.

    same_tokens   the policy has the same tokenizer and chat template: its tokens are read as they are. An answer that
                  was cut off, without an end of turn, is then scored at its last token
    end_token     that of an end of turn
    suffix        what the chat template writes behind an end of turn, read where the policy's answer has one
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    same_tokens: bool
    end_token: int
    suffix: Array
    bin_tokens: int = BIN_TOKENS
    bf16: bool = False

    def __call__(self, items: Sequence[RewardItem]) -> list[Reward]:
        """The value is the model's score; `error` for an answer that it cannot read (the note says why)."""
        rewards: list[Reward | None] = [None] * len(items)
        groups: dict[bytes, list[tuple[int, Array, Array]]] = {}
        for i, item in enumerate(items):
            try:
                prompt, answer = self._encode(item)
                require_room(self.model, len(prompt) + len(answer))
            except DataError as error:
                rewards[i] = Reward(None, "error", f"{self.name}: {error}")
            else:
                groups.setdefault(prompt.tobytes(), []).append((i, prompt, answer))
        trees = [
            build_completions(
                members[0][1],
                [answer for _, _, answer in members],
                [{"weights": weigh_end(answer)} for _, _, answer in members],
            )
            for members in groups.values()
        ]
        values = self._score(trees)
        for place, (i, _, _) in enumerate(member for members in groups.values() for member in members):
            rewards[i] = build_reward(float(values[place]), self.name)
        return [reward for reward in rewards if reward is not None]

    def _encode(self, item: RewardItem) -> tuple[Array, Array]:
        """Token ids of the prompt and of the answer, the latter without padding at its end and not empty."""
        if self.same_tokens:
            prompt, answer = item.prompt_tokens, item.completion_tokens
            if len(answer) and int(answer[-1]) == self.end_token:
                answer = np.concatenate([answer, self.suffix])
        else:
            prompt, (answer,) = encode_answers(
                self.tokenizer, list(map(dict, item.messages)), [item.completion], "text"
            )
        answer = cut_padding(self.tokenizer, answer)
        if not len(answer):
            raise DataError("the answer is empty: there is no token to score it at")
        return prompt, answer

    def _score(self, trees: Sequence[Tree]) -> Array:
        if not trees:
            return np.zeros(0)
        values: Array = compute_tree_values(self.model, trees, bin_tokens=self.bin_tokens, bf16=self.bf16)[:, 0]
        return values


@dataclass(frozen=True)
class ProcessRewardModel:
    """Scores answers by their steps; a `Rewarder`. Build it with `load_process_reward_model`.

    aggregate   of the probabilities that the steps are right: their `min` (Math-Shepherd, arXiv 2312.08935), their
                `product` (Lightman et al., arXiv 2305.20050) or that of the `last` step
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    separator: str
    aggregate: Aggregate = "min"
    bin_tokens: int = BIN_TOKENS
    bf16: bool = False

    def __call__(self, items: Sequence[RewardItem]) -> list[Reward]:
        """A value in [0, 1]; 0 and `unparsed` for an answer without a step, `error` for one that cannot be read."""
        steps = [split_steps(item.completion, self.separator) for item in items]
        scores = self.score_steps([item.messages for item in items], steps)
        rewards = []
        for given, found in zip(steps, scores, strict=True):
            if isinstance(found, str):
                rewards.append(Reward(None, "error", f"{self.name}: {found}"))
            elif not given:
                rewards.append(Reward(0.0, "unparsed", f"{self.name}: the answer has no step"))
            else:
                rewards.append(build_reward(aggregate_steps(found, self.aggregate), self.name))
        return rewards

    def score_steps(
        self, prompts: Sequence[Sequence[Mapping[str, Any]]], steps: Sequence[Sequence[str]]
    ) -> list[Array | str]:
        """The probability that each step is right, float64 [steps], for each answer; why not, where it cannot be read.

        An answer may be unfinished: its steps so far are scored.
        """
        separator = encode_separator(self.tokenizer, self.separator)
        out: list[Array | str] = [np.zeros(0)] * len(steps)
        trees: dict[int, Tree] = {}
        for i, (prompt, own) in enumerate(zip(prompts, steps, strict=True)):
            if not own:
                continue
            try:
                ids, ends = encode_steps(self.tokenizer, own, separator)
                tree = build_step_tree(render_prompt(self.tokenizer, prompt), ids, ends)
                require_room(self.model, tree_length(tree))
            except DataError as error:
                out[i] = str(error)
            else:
                trees[i] = tree
        if trees:
            values = compute_tree_values(
                self.model, list(trees.values()), bin_tokens=self.bin_tokens, bf16=self.bf16
            ).astype(np.float64)
            right = np.exp(-np.logaddexp(0.0, values[:, 0] - values[:, 1]))
            cuts = np.cumsum([len(steps[i]) for i in trees])[:-1]
            out_of = dict(zip(trees, np.split(right, cuts), strict=True))
            out = [out_of.get(i, found) for i, found in enumerate(out)]
        return out


def aggregate_steps(right: Array, aggregate: Aggregate) -> float:
    """One number from the probabilities of an answer's steps (at least one)."""
    match aggregate:
        case "min":
            return float(right.min())
        case "product":
            return float(right.prod())
        case "last":
            return float(right[-1])


def build_reward(value: float, name: str) -> Reward:
    """A score, or `error` for one that is no finite number."""
    if not math.isfinite(value):
        return Reward(None, "error", f"{name}: the score is {value}")
    return Reward(value, "scored")


def require_room(model: PreTrainedModel, num_tokens: int) -> None:
    """DataError for an answer that is longer than the model's context."""
    virtual = read_virtual(model)
    room = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))
    room -= virtual.num if virtual is not None else 0
    if num_tokens > room:
        raise DataError(f"prompt and answer have {num_tokens} tokens, and the context of the model is {room}")


def load_reward_model(
    source: str | Path,
    policy: PreTrainedTokenizerFast | None = None,
    *,
    device: str = "cpu",
    bin_tokens: int = BIN_TOKENS,
    bf16: bool = False,
) -> RewardModel:
    """A rewarder from a sequence classification checkpoint with one label, or an adapter of one (a folder, or a hub
    id).

    policy   the tokenizer of the model that writes the answers; None = its tokens are never read
    """
    tokenizer = load_own_tokenizer(str(source))
    model = load_classifier(str(source), num_labels=1, device=device)
    same = (
        policy is not None
        and fingerprint_tokenizer(policy) == fingerprint_tokenizer(tokenizer)
        and policy.chat_template == tokenizer.chat_template
    )
    rendered = render_chat(tokenizer, PROBE)
    suffix = rendered.token_ids[int(np.flatnonzero(rendered.assistant_mask)[-1]) + 1 :]
    return RewardModel(model, tokenizer, str(source), same, stop_token_ids(tokenizer)[0], suffix, bin_tokens, bf16)


def load_process_reward_model(
    source: str | Path,
    *,
    aggregate: Aggregate = "min",
    separator: str | None = None,
    device: str = "cpu",
    bin_tokens: int = BIN_TOKENS,
    bf16: bool = False,
) -> ProcessRewardModel:
    """A rewarder from a token classification checkpoint with two labels (wrong, right), or an adapter of one.

    separator   the text between steps; None = as the checkpoint's config names it, or polm's note beside an adapter
    """
    model = load_classifier(str(source), num_labels=2, device=device)
    chosen = separator if separator is not None else getattr(model.config, SEPARATOR_FIELD, None)
    if not chosen:
        raise ModelError(
            f"the config of {source} names no {SEPARATOR_FIELD}; give the separator that stands between steps"
        )
    tokenizer = load_own_tokenizer(str(source))
    encode_separator(tokenizer, chosen)
    return ProcessRewardModel(model, tokenizer, str(source), chosen, aggregate, bin_tokens, bf16)
