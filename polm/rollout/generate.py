"""The built-in generator: continuous batching over one flat stream of tokens, on any model that `load_model` takes.

Requests (a prompt and a sample number) wait in a queue; live rows stand in slots 0 to R - 1 of a static cache. Each
distinct prompt is read once, and its keys and values are copied to the rows of all its samples (`reader`). A decoding
step is a forward over a stream of one token per live row. A finished row leaves at once: the last live row takes its
slot. Freed slots are refilled a few at a time, so that prompts are read in batches.

Shape suffixes: R rows, N rows that a call looks at, V vocabulary, T tokens, Q requests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import autocast
from polm.errors import NonFiniteError, UserError
from polm.models.kernels.install import kernels_while_sampling
from polm.models.virtual import VirtualTokens, read_virtual
from polm.rollout.reader import Reader, build_readers
from polm.rollout.sampling import (
    apply_top_k,
    apply_top_p,
    build_key,
    compute_tempered_logprobs,
    compute_uniforms,
    sample_inverse_cdf,
)
from polm.tokens import Array

# The queue is asked when this share of the slots is free: a prefill has a fixed cost, an idle slot has one too.
REFILL_SHARE = 8
LIVE, STOP_TOKEN, STOP_STRING, LENGTH = 0, 1, 2, 3


@dataclass(frozen=True)
class SamplingParams:
    """How to draw completions. Raises UserError for values that make no sense.

    max_new_tokens   at most so many tokens per completion; less where `max_position_embeddings` leaves less room
    temperature      divides the logits; 0 = greedy
    top_p, top_k     draw from the nucleus, from the k likeliest (0 = off); top-k first, as in `transformers`
    stop             strings that end a completion as soon as its text holds one of them
    stop_token_ids   tokens that end a completion, besides the tokenizer's end-of-text token
    num_samples      completions per prompt
    seed             the draw depends on (seed, prompt index, sample index, step) and on nothing else
    not_first        tokens that no completion may begin with (its other tokens are free)
    ignore_eos       neither end-of-text nor `stop_token_ids` end a completion (forced lengths for benchmarks)
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    num_samples: int = 1
    seed: int = 0
    not_first: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        expected = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 = off)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 = off)"),
            "stop": (all(self.stop) and not isinstance(self.stop, str), "a tuple of strings, none of them empty"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "seed": (self.seed >= 0, "at least 0"),
            "not_first": (all(token >= 0 for token in self.not_first), "token ids"),
        }
        for name, (valid, wanted) in expected.items():
            if not valid:
                raise UserError(f"sampling: {name} is {getattr(self, name)!r}; expected {wanted}")


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    tokens     int64, with the stop token if it ended with one
    logprobs   float32, log-probability of each token under the tempered distribution *before* top-k and top-p cut it
               (as `engine.score` computes it at the same temperature); for greedy, at temperature 1
    finish     "stop" (a stop token or string) or "length" (no tokens left to spend)
    text       decoded, special tokens skipped, without the stop token, cut before the stop string
    """

    prompt_index: int
    sample_index: int
    tokens: Array
    logprobs: Array
    finish: Literal["stop", "length"]
    text: str


@dataclass(frozen=True)
class Mixture:
    """A second model, with the same tokens, whose logits are mixed in. Each token is drawn from p^(1 - share) q^share,
    renormalised: the geometric mixture of Nash-MD, one token at a time (arXiv 2312.00886, section 7). The completion's
    log-probabilities are those of the mixture. Raises UserError for a share outside [0, 1].
    """

    model: PreTrainedModel
    share: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise UserError(f"mixture: share is {self.share}; expected a number from 0 (first model) to 1 (second)")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Array | list[int]],
    params: SamplingParams,
    *,
    bf16: bool = False,
    max_rows: int = 256,
    max_cache_bytes: int = 1 << 30,
    progress: Callable[[int, int], None] | None = None,
    mixture: Mixture | None = None,
    streams: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
) -> list[Completion]:
    """Continue each prompt (token ids) `params.num_samples` times; ordered by (prompt, sample).

    `model` comes from `load_model` or `prepare_model`; `mixture` may add a second one. At most `max_rows` completions
    are decoded at a time, and no more than `max_cache_bytes` of keys and values hold (at least one). `progress(done,
    total)` counts completions.
    `streams` gives each prompt a number that takes the place of its index in the draw (see `SamplingParams.seed`), so
    that its completions do not depend on the prompts beside it.
    `limits` gives each prompt its own number of new tokens, in place of `params.max_new_tokens`.
    The result does not depend on `max_rows`, but for draws so near a boundary that rounding decides them.
    Raises UserError for a prompt that is empty, has unknown ids or leaves no room, and for `limits` that do not fit the
    prompts; NonFiniteError for NaN logits.
    """
    models = [model] if mixture is None else [model, mixture.model]
    with torch.no_grad():
        virtual = [read_virtual(one) for one in models]
    queue = _build_queue(models, virtual, prompts, params, streams, limits)
    if max_rows < 1:
        raise UserError(f"max_rows is {max_rows}; expected at least 1")
    if not len(queue.prompt_Q):
        return []
    modes = [(module, module.training) for one in models for module in one.modules()]
    for one in models:
        one.eval()
    try:
        # One enclosing autocast keeps the bf16 copies of the weights for the whole call (where the kernels for few rows
        # are, `kernels_while_sampling` does).
        with (
            torch.no_grad(),
            autocast(model.device.type, bf16),
            _cacheable_casts(models, bf16),
            kernels_while_sampling(),
        ):
            max_rows = min(max_rows, len(queue.prompt_Q))
            readers = build_readers(models, virtual, queue.groups, queue.group_limits, bf16, max_rows, max_cache_bytes)
            rows = _Rows(readers, mixture.share if mixture is not None else 0.0, tokenizer, queue, params)
            ended = rows.run(progress)
    finally:
        # Within a caller's autocast the casts would outlive this call, and carry no gradient.
        torch.clear_autocast_cache()
        for module, mode in modes:
            module.training = mode
    return _build_completions(tokenizer, queue, ended, params)


@dataclass(frozen=True)
class _Queue:
    """All requests, those of the same prompt side by side: request q is a sample of distinct prompt `group_Q[q]`."""

    groups: list[Array]  # the distinct prompts
    group_limits: list[int]  # new tokens that any of its completions may have
    group_Q: Array
    prompt_Q: Array
    sample_Q: Array
    limits: list[int]  # of each prompt: new tokens that its completions may have
    streams: Sequence[int]  # of each prompt: whose random numbers it draws


def _build_queue(
    models: Sequence[PreTrainedModel],
    virtual: Sequence[VirtualTokens | None],
    prompts: Sequence[Array | list[int]],
    params: SamplingParams,
    streams: Sequence[int] | None,
    limits: Sequence[int] | None,
) -> _Queue:
    vocab, *others = (int(model.get_input_embeddings().weight.shape[0]) for model in models)
    if others and others[0] != vocab:
        raise UserError(f"mixture: the models have {vocab} and {others[0]} token ids; they must share a vocabulary")
    room = min(
        (getattr(model.config.get_text_config(), "max_position_embeddings", None) or (1 << 62))
        - (above.num if above is not None else 0)
        for model, above in zip(models, virtual, strict=True)
    )
    members: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        ids = np.asarray(prompt, dtype=np.int64)
        if not len(ids):
            raise UserError(f"prompt {index} is empty; give at least one token, such as the end-of-text token")
        if ids.min() < 0 or ids.max() >= vocab:
            raise UserError(
                f"prompt {index} has token id {ids.max() if ids.max() >= vocab else ids.min()}, the model has ids 0 to "
                f"{vocab - 1}; use the tokenizer that belongs to the model"
            )
        if len(ids) >= room:
            raise UserError(
                f"prompt {index} has {len(ids)} tokens, which leaves no room for new ones: the model has {room} "
                "positions (max_position_embeddings, less its virtual tokens); shorten the prompt or use a model with "
                "more"
            )
        members.setdefault(ids.tobytes(), []).append(index)
    groups = [np.frombuffer(key, dtype=np.int64) for key in members]
    counts = [len(indices) * params.num_samples for indices in members.values()]
    prompt_indices = np.array([index for indices in members.values() for index in indices], dtype=np.int64)
    wanted = _read_limits(limits, len(prompts), params)
    allowed = [min(limit, room - len(prompt)) for limit, prompt in zip(wanted, prompts, strict=True)]
    return _Queue(
        groups=groups,
        group_limits=[max(allowed[index] for index in indices) for indices in members.values()],
        group_Q=np.repeat(np.arange(len(groups)), counts),
        prompt_Q=np.repeat(prompt_indices, params.num_samples),
        sample_Q=np.tile(np.arange(params.num_samples), len(prompt_indices)),
        limits=allowed,
        streams=range(len(prompts)) if streams is None else streams,
    )


def _read_limits(limits: Sequence[int] | None, num_prompts: int, params: SamplingParams) -> Sequence[int]:
    """The new tokens that each prompt is meant to have at most."""
    if limits is None:
        return [params.max_new_tokens] * num_prompts
    if len(limits) != num_prompts or min(limits, default=1) < 1:
        raise UserError(
            f"limits: {len(limits)} numbers for {num_prompts} prompts, the smallest {min(limits, default=None)}; "
            "expected a number for each prompt, at least 1"
        )
    return limits


@contextlib.contextmanager
def _cacheable_casts(models: Sequence[PreTrainedModel], bf16: bool) -> Iterator[None]:
    """Autocast keeps the cast of a weight only if it requires a gradient; let frozen weights pass for such."""
    weights = [p for model in models for p in model.parameters()]
    frozen = [p for p in weights if bf16 and p.dtype == torch.float32 and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class _Ended:
    """A request that is done."""

    tokens: Array
    logprobs: Array
    reason: int


class _Rows:
    """The live rows and the queue behind them. The host's tables say which request stands in which slot.

    The logits are those of the first reader, or of two readers, mixed: `share` is that of the second.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        share: float,
        tokenizer: PreTrainedTokenizerFast,
        queue: _Queue,
        params: SamplingParams,
    ):
        self.readers, self.share, self.queue, self.params = readers, share, queue, params
        model, num_slots = readers[0].model, readers[0].cache.num_slots
        self.num_slots = num_slots
        self.stop_strings = _StopStrings(tokenizer, params.stop) if params.stop else None
        self.is_stop_V = _build_stop_table(model, tokenizer, params)
        self.num_live = 0
        self.next_request = 0
        self.request = np.zeros(num_slots, dtype=np.int64)
        self.prompt_length = np.zeros(num_slots, dtype=np.int64)
        self.num_tokens = np.zeros(num_slots, dtype=np.int64)
        self.limit = np.zeros(num_slots, dtype=np.int64)
        self.key = np.zeros(num_slots, dtype=np.uint64)
        self.last_token = np.zeros(num_slots, dtype=np.int64)
        self.reason = np.zeros(num_slots, dtype=np.int64)
        self.tokens = np.zeros((num_slots, max(queue.group_limits)), dtype=np.int64)
        self.logprobs = np.zeros((num_slots, max(queue.group_limits)), dtype=np.float32)
        self.tables: tuple[Array, ...] = (
            *(self.request, self.prompt_length, self.num_tokens, self.limit, self.key, self.last_token, self.reason),
            *(self.tokens, self.logprobs),
        )
        self.ended: list[_Ended | None] = [None] * len(queue.prompt_Q)
        self.num_ended = 0

    def run(self, progress: Callable[[int, int], None] | None) -> list[_Ended]:
        """Serve the whole queue; the result is in the queue's order."""
        total = len(self.queue.prompt_Q)
        while self.num_ended < total:
            before = self.num_ended
            if self._wants_refill():
                first = self.num_live
                logits_NV = self._refill()
            else:
                first = 0
                logits_NV = self._decode()
            self._accept(slice(first, self.num_live), logits_NV)
            self._retire()
            if progress is not None and self.num_ended > before:
                progress(self.num_ended, total)
        return [ended for ended in self.ended if ended is not None]

    def _wants_refill(self) -> bool:
        if self.next_request == len(self.queue.prompt_Q):
            return False
        free = self.num_slots - self.num_live
        return self.num_live == 0 or free * REFILL_SHARE >= self.num_slots

    def _refill(self) -> Tensor:
        """Give the free slots to the next requests; returns the logits [N, V] of their first tokens."""
        queue, first = self.queue, self.num_live
        count = min(self.num_slots - first, len(queue.prompt_Q) - self.next_request)
        requests = np.arange(self.next_request, self.next_request + count)
        groups = queue.group_Q[requests]
        slots = np.arange(first, first + count)
        self.request[slots] = requests
        self.prompt_length[slots] = [len(queue.groups[g]) for g in groups]
        self.limit[slots] = [queue.limits[p] for p in queue.prompt_Q[requests]]
        self.num_tokens[slots] = 0
        self.reason[slots] = LIVE
        if self.params.temperature > 0:
            pairs = zip(queue.prompt_Q[requests].tolist(), queue.sample_Q[requests].tolist(), strict=True)
            self.key[slots] = [build_key(self.params.seed, queue.streams[prompt], sample) for prompt, sample in pairs]
        self.next_request += count
        self.num_live += count
        waiting = self.next_request < len(queue.prompt_Q) and bool(queue.group_Q[self.next_request] == groups[-1])
        return self._mix([reader.read_prompts(groups, slots, waiting) for reader in self.readers])

    def _decode(self) -> Tensor:
        """The logits [R, V] of each live row's next token."""
        live = slice(0, self.num_live)
        positions_R = self.prompt_length[live] + self.num_tokens[live] - 1
        return self._mix([reader.read_tokens(self.last_token[live], positions_R) for reader in self.readers])

    def _mix(self, logits: Sequence[Tensor]) -> Tensor:
        if len(logits) == 1:
            return logits[0]
        return (1.0 - self.share) * logits[0] + self.share * logits[1].to(logits[0].device)

    def _accept(self, slots: slice, logits_NV: Tensor) -> None:
        """Draw a token for each of the slots, note it, and see which rows it ends."""
        params, steps = self.params, self.num_tokens[slots].copy()
        logprobs_NV = compute_tempered_logprobs(logits_NV, params.temperature)
        open_NV = self._forbid_first(logprobs_NV, steps) if params.not_first else logprobs_NV
        if params.temperature == 0:
            chosen = open_NV.argmax(-1)
        else:
            allowed_NV = apply_top_p(apply_top_k(open_NV, params.top_k), params.top_p)
            uniforms = torch.from_numpy(compute_uniforms(self.key[slots], steps)).to(logits_NV.device)
            # NaN logits may point behind the vocabulary; they are reported below.
            chosen = sample_inverse_cdf(allowed_NV, uniforms).clamp_(max=logits_NV.shape[1] - 1)
        logprobs = logprobs_NV.gather(1, chosen[:, None])[:, 0].cpu().numpy()
        tokens = chosen.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise NonFiniteError(
                f"the model gives logits that are not finite numbers ({int((~np.isfinite(logprobs)).sum())} of "
                f"{len(logprobs)} rows); its weights are damaged or its training diverged: use an earlier checkpoint"
            )
        rows = np.arange(slots.start, slots.stop)
        self.tokens[rows, steps] = tokens
        self.logprobs[rows, steps] = logprobs
        self.last_token[slots] = tokens
        self.num_tokens[slots] = steps + 1
        reason = np.where(steps + 1 >= self.limit[slots], LENGTH, LIVE)
        if self.stop_strings is not None:
            reason[self.stop_strings.find(self.tokens[slots], steps + 1)] = STOP_STRING
        reason[self.is_stop_V[tokens]] = STOP_TOKEN
        self.reason[slots] = reason

    def _forbid_first(self, logprobs_NV: Tensor, steps_N: Array) -> Tensor:
        """The log-probabilities with -inf at `not_first` in the rows that have no token yet; not renormalised."""
        first = torch.from_numpy(np.flatnonzero(steps_N == 0)).to(logprobs_NV.device)
        if not len(first):
            return logprobs_NV
        open_NV = logprobs_NV.clone()
        for token in self.params.not_first:
            open_NV[first, token] = float("-inf")
        return open_NV

    def _retire(self) -> None:
        """Take the finished rows out and close the gaps with the last live rows."""
        finished = np.flatnonzero(self.reason[: self.num_live])
        if not len(finished):
            return
        for slot in finished.tolist():
            count = self.num_tokens[slot]
            self.ended[self.request[slot]] = _Ended(
                self.tokens[slot, :count].copy(), self.logprobs[slot, :count].copy(), int(self.reason[slot])
            )
        self.num_ended += len(finished)
        left = self.num_live - len(finished)
        targets = finished[finished < left]
        sources = left + np.flatnonzero(self.reason[left : self.num_live] == LIVE)
        self.num_live = left
        if not len(targets):
            return
        for table in self.tables:
            table[targets] = table[sources]
        length = int((self.prompt_length[targets] + self.num_tokens[targets]).max()) - 1
        for reader in self.readers:
            reader.move(sources, targets, length)


def _build_stop_table(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, params: SamplingParams) -> Array:
    """For each token id whether it ends a completion."""
    table = np.zeros(int(model.get_input_embeddings().weight.shape[0]), dtype=bool)
    eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    for token in () if params.ignore_eos else (*eos, *params.stop_token_ids):
        if not 0 <= token < len(table):
            raise UserError(f"sampling: stop token {token} is none of the model's ids, 0 to {len(table) - 1}")
        table[token] = True
    return table


class _StopStrings:
    """Finds rows whose text has just come to hold a stop string.

    Only rows whose last token may complete one are decoded, and of those only a tail. Each token that is not special
    gives at least one byte, so a tail of as many tokens as the longest stop string has bytes holds it whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        # A few tokens more: some decoders treat the first token (its leading space) in another way.
        self.tail = max(len(s.encode()) for s in stop) + 2
        self.last_characters = {s[-1] for s in stop}
        self.special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.may_complete: dict[int, bool] = {}

    def find(self, tokens_NT: Array, lengths_N: Array) -> Array:
        """Indices of the rows with a stop string in their text, the last token of which is part of it."""
        last = tokens_NT[np.arange(len(tokens_NT)), lengths_N - 1].tolist()
        for token in set(last) - self.may_complete.keys():
            self.may_complete[token] = self._may_complete(token)
        rows = [row for row, token in enumerate(last) if self.may_complete[token]]
        found = [row for row in rows if self._holds(tokens_NT[row, : lengths_N[row]].tolist())]
        return np.array(found, dtype=np.int64)

    def _may_complete(self, token: int) -> bool:
        text = _decode(self.tokenizer, [token])
        # U+FFFD: part of a character. A space may come from a decoder that joins words, from any token.
        return "\ufffd" in text or any(c == " " or c in text for c in self.last_characters)

    def _holds(self, tokens: list[int]) -> bool:
        tail = tokens[-self.tail :]
        if not self.special.isdisjoint(tail):  # special tokens give no bytes
            tail = tokens
        # A tail may read otherwise than the same tokens within the whole text, which has the last word.
        return self._in_text(tail) and (tail is tokens or self._in_text(tokens))

    def _in_text(self, tokens: list[int]) -> bool:
        text = _decode(self.tokenizer, tokens)
        return any(s in text for s in self.stop)


def _decode(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _build_completions(
    tokenizer: PreTrainedTokenizerFast, queue: _Queue, ended: list[_Ended], params: SamplingParams
) -> list[Completion]:
    out = []
    for prompt, sample, end in zip(queue.prompt_Q.tolist(), queue.sample_Q.tolist(), ended, strict=True):
        shown = end.tokens[:-1] if end.reason == STOP_TOKEN else end.tokens
        text = _decode(tokenizer, shown.tolist())
        cuts = [text.find(s) for s in params.stop if s in text]
        text = text[: min(cuts)] if cuts else text
        finish: Literal["stop", "length"] = "length" if end.reason == LENGTH else "stop"
        out.append(Completion(prompt, sample, end.tokens, end.logprobs, finish, text))
    return sorted(out, key=lambda completion: (completion.prompt_index, completion.sample_index))
