"""How a model reads in generation: prompts packed as the roots of a forest, then one token of each live row at a time.

Shape suffixes: R live rows, N slots to fill, P prompts of a prefill, V vocabulary, T tokens of a stream, J key heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.models.forest_attention import Attends, build_plan
from polm.models.kernels.decode import FEW_ROWS, can_attend
from polm.models.kernels.install import takes_kernels
from polm.models.loading import output_head, output_logits
from polm.models.virtual import PrefixPlan, VirtualTokens
from polm.rollout.cache import (
    CacheShape,
    Captured,
    DecodeCache,
    PrefillCapture,
    compute_ranges,
    read_cache_shape,
    round_width,
)
from polm.rollout.recorded import RecordedSteps, Recorder, choose_recorder
from polm.rollout.stack import build_stack
from polm.tokens import Array, Segment, collate

# Prompts are read in streams of about this many tokens, which bounds the memory of a prefill.
PREFILL_TOKENS = 1024
GPU_PREFILL_TOKENS = 4096  # fewer would not fill it


def run_decoder(model: PreTrainedModel, tokens_T: Tensor, positions_T: Tensor, forest: Attends) -> Tensor:
    """Final hidden states [T, width] of a flat stream that attends through `forest`."""
    out = model.get_decoder()(
        input_ids=tokens_T[None], position_ids=positions_T[None], attention_mask=None, use_cache=False, forest=forest
    )
    hidden_TD: Tensor = out.last_hidden_state[0]
    return hidden_TD


@dataclass(frozen=True)
class Prefilled:
    """What a few prompts (`first_group` and those after it) leave behind: captured streams, and next-token logits."""

    first_group: int
    layers: Captured
    starts_P: Array
    lengths_P: Array
    logits_PV: Tensor

    def only_last(self) -> Prefilled:
        """The last prompt on its own, without holding the memory of the others."""
        start, length, index = int(self.starts_P[-1]), int(self.lengths_P[-1]), len(self.starts_P) - 1
        layers = {
            layer: (key[:, start : start + length].clone(), value[:, start : start + length].clone())
            for layer, (key, value) in self.layers.items()
        }
        return Prefilled(
            self.first_group + index, layers, np.zeros(1, np.int64), self.lengths_P[-1:], self.logits_PV[-1:].clone()
        )


def capture_virtual(model: PreTrainedModel, virtual: VirtualTokens) -> VirtualTokens:
    """The keys and values of the virtual tokens, read once for all rows."""
    if virtual.layers is not None or virtual.embeddings_PD is None:
        return virtual
    batch = collate([(Segment(np.zeros(virtual.num, dtype=np.int64)),)]).to(model.device)
    num_heads, bf16 = int(model.config.get_text_config().num_attention_heads), torch.is_autocast_enabled("cpu")
    capture = PrefillCapture(build_plan(batch, num_heads, round_up=bf16))
    model.get_decoder()(
        inputs_embeds=virtual.embeddings_PD[None],
        position_ids=batch.positions_T[None],
        attention_mask=None,
        use_cache=False,
        forest=capture,
    )
    return VirtualTokens(virtual.num, layers=capture.layers)


def prefill(
    model: PreTrainedModel, prompts: Sequence[Array], first_group: int, above: VirtualTokens | None = None
) -> Prefilled:
    """Read prompts, packed as the roots of a forest (under the virtual tokens `above`, if any), in one forward."""
    batch = collate([(Segment(ids),) for ids in prompts]).to(model.device)
    num = above.num if above is not None else 0
    plan: Attends = build_plan(batch, int(model.config.get_text_config().num_attention_heads), virtual=num)
    if above is not None and above.layers is not None:
        plan = PrefixPlan(plan, num, above.layers)
    capture = PrefillCapture(plan)
    hidden_TD = run_decoder(model, batch.tokens_T, batch.positions_T + num, capture)
    logits_PV = output_logits(model, hidden_TD.index_select(0, batch.starts_S + batch.lengths_S - 1))
    return Prefilled(
        first_group, capture.layers, batch.starts_S.cpu().numpy(), batch.lengths_S.cpu().numpy(), logits_PV
    )


def read_static(model: PreTrainedModel, cache: DecodeCache, tokens_R: Tensor, positions_R: Tensor, end: int) -> Tensor:
    """A decoding step in which nothing but the numbers in the two tensors may change, so that it can be recorded."""
    cache.begin(positions_R, 0, end)
    return output_logits(model, run_decoder(model, tokens_R, positions_R, cache))


class Reader:
    """One model at work: it reads prompts and the live rows' tokens, and keeps their keys and values.

    The keys and values of its virtual tokens, `above`, stand before each row's own, the same in every slot.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Array],
        cache: DecodeCache,
        above: VirtualTokens | None,
        recorder: Recorder | None = None,
    ):
        self.model, self.prompts, self.cache, self.above = model, prompts, cache, above
        self.num_above = above.num if above is not None else 0
        if above is not None and above.layers is not None:
            places, slots = np.arange(above.num), np.arange(cache.num_slots)
            repeated = np.tile(places, cache.num_slots)
            self.cache.fill(dict(above.layers), repeated, np.repeat(slots, above.num), repeated)
        self.held: Prefilled | None = None
        self.stack = build_stack(model, cache)
        self.by_kernel = takes_kernels(model)
        self.recorded: RecordedSteps | None = None
        if recorder is not None:
            vocab = int(output_head(model)[0].shape[0])
            sizes = cache.num_slots, cache.length, vocab
            self.recorded = RecordedSteps(partial(read_static, model, cache), recorder, *sizes, model.device)

    def read_prompts(self, groups: Array, slots: Array, waiting: bool) -> Tensor:
        """Fill slots [N] with the distinct prompts `groups` [N]; returns the logits [N, V] of their first tokens.

        With `waiting` the last prompt has samples still in the queue: it is kept, so that it is read only once.
        """
        logits_parts: list[Tensor] = []
        last: Prefilled | None = None
        for part in self._prefill(int(groups[0]), int(groups[-1])):
            begin = int(np.searchsorted(groups, part.first_group))
            end = int(np.searchsorted(groups, part.first_group + len(part.starts_P)))
            chosen = groups[begin:end] - part.first_group
            lengths = part.lengths_P[chosen]
            source, positions = compute_ranges(part.starts_P[chosen], lengths)
            self.cache.fill(part.layers, source, np.repeat(slots[begin:end], lengths), self.num_above + positions)
            logits_parts.append(part.logits_PV.index_select(0, torch.from_numpy(chosen).to(part.logits_PV.device)))
            last = part
        self.held = last.only_last() if waiting and last is not None else None
        return torch.cat(logits_parts)

    def _prefill(self, first: int, last: int) -> Iterator[Prefilled]:
        """Distinct prompts `first` to `last` in streams of bounded length; the first may be held from before."""
        if self.held is not None:  # the queue keeps a prompt's requests together, so it is the first one's
            yield self.held
            first += 1
        limit = PREFILL_TOKENS if self.model.device.type == "cpu" else GPU_PREFILL_TOKENS
        chunk: list[Array] = []
        for group in range(first, last + 1):
            chunk.append(self.prompts[group])
            following = len(self.prompts[group + 1]) if group < last else limit
            if sum(map(len, chunk)) + following > limit:
                yield prefill(self.model, chunk, group + 1 - len(chunk), self.above)
                chunk = []

    def read_tokens(self, tokens_R: Array, positions_R: Array) -> Tensor:
        """Feed each live row's last token; returns the logits [R, V] of the next."""
        if self.recorded is not None and not self.recorded.given_up:
            return self.recorded.run(tokens_R, self.num_above + positions_R)
        rows = len(tokens_R)
        by_kernel = rows <= FEW_ROWS and self.by_kernel
        if self.model.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not by_kernel:
            # The library's bf16 products are compiled, and the code kept, for each number of rows, and a batch that
            # shrinks goes through all of them. So slots behind the live rows come along, at a place that is in use, and
            # nobody reads what they give.
            more = (0, min(round_width(rows), self.cache.num_slots) - rows)
            tokens_R, positions_R = np.pad(tokens_R, more), np.pad(positions_R, more, mode="edge")
        positions = self.cache.begin_step(self.num_above + positions_R)
        tokens = torch.from_numpy(tokens_R).to(self.model.device)
        if self.stack is not None and by_kernel:
            return output_logits(self.model, self.stack.run(tokens, positions))
        return output_logits(self.model, run_decoder(self.model, tokens, positions, self.cache))[:rows]

    def move(self, sources: Array, targets: Array, length: int) -> None:
        """Copy the first `length` tokens of some slots to other slots (none is both)."""
        self.cache.move(sources, targets, self.num_above + length)


def _choose_dtype(model: PreTrainedModel, shape: CacheShape, bf16: bool) -> torch.dtype:
    """Of the keys and values: on a CPU float32, whose products of one query row are faster, unless the kernel takes
    bf16."""
    if model.device.type == "cpu":
        return torch.bfloat16 if bf16 and can_attend(shape.head_width) else torch.float32
    return torch.bfloat16 if bf16 else model.dtype


def build_readers(
    models: Sequence[PreTrainedModel],
    virtual: Sequence[VirtualTokens | None],
    prompts: Sequence[Array],
    limits: Sequence[int],
    bf16: bool,
    max_rows: int,
    max_cache_bytes: int,
) -> list[Reader]:
    """A reader a model, all with the same number of slots: `max_rows`, or what `max_cache_bytes` hold of all of them
    together, at least one. `limits` are the new tokens that may stand behind each of the distinct prompts."""
    shapes = [read_cache_shape(model) for model in models]
    above = [capture_virtual(m, own) if own is not None else None for m, own in zip(models, virtual, strict=True)]
    dtypes = [_choose_dtype(model, shape, bf16) for model, shape in zip(models, shapes, strict=True)]
    # The last token of a row is never fed.
    longest = max(len(ids) + limit - 1 for ids, limit in zip(prompts, limits, strict=True))
    lengths = [longest + (own.num if own is not None else 0) for own in above]
    row_bytes = sum(s.num_values * n * dtype.itemsize for s, n, dtype in zip(shapes, lengths, dtypes, strict=True))
    num_slots = max(1, min(max_rows, max_cache_bytes // row_bytes))
    return [
        Reader(
            *(model, prompts, DecodeCache(shape, num_slots, length, dtype, model.device), own),
            choose_recorder(model.device),
        )
        for model, shape, length, dtype, own in zip(models, shapes, lengths, dtypes, above, strict=True)
    ]
