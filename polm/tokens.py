"""The token forest: one packed stream of tokens, cut into segments that may have parents.

A token attends to its own segment so far and to all ancestors of that segment, nothing else. Packed documents are
a forest of roots; a preference pair is one prompt with two children; a GRPO group is one prompt with G children.

Shape suffixes: T tokens of the stream, S segments of the stream, N target tokens (weight other than zero),
K candidate tokens per target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polm.errors import DataError

Array = np.ndarray[Any, Any]
NO_STREAMS: Mapping[str, Array] = MappingProxyType({})
NO_MARKS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Segment:
    """A run of tokens in a tree, before packing.

    `parent` is the index of the parent segment in the same tree, -1 for the root; parents stand before children.
    `streams` are aligned to the tokens, shape [n] or [n, K]; `weights` (0 = context only) is one of them and is
    taken as all zero where absent. `marks` are single numbers of the whole segment (a pair's index, a sign).
    """

    tokens: Array
    parent: int = -1
    streams: Mapping[str, Array] = field(default_factory=dict)
    marks: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


Tree = tuple[Segment, ...]


def tree_length(tree: Tree) -> int:
    """Number of tokens that a tree takes in the stream (a shared prompt counts once)."""
    return sum(len(segment) for segment in tree)


def build_document(tokens: Sequence[int] | Array, streams: Mapping[str, Array] = NO_STREAMS) -> Tree:
    """A tree of one root in which every token but the first (which nothing predicts) is a target of weight 1."""
    ids = np.asarray(tokens, dtype=np.int64)
    weights = np.ones(len(ids), dtype=np.float32)
    weights[:1] = 0.0
    return (Segment(ids, streams={"weights": weights, **streams}),)


def build_completions(
    prompt: Sequence[int] | Array,
    completions: Sequence[Sequence[int] | Array],
    streams: Sequence[Mapping[str, Array]] | None = None,
    marks: Sequence[Mapping[str, float]] | None = None,
) -> Tree:
    """One prompt (context only) with a child for each completion, whose tokens are targets of weight 1."""
    segments = [Segment(np.asarray(prompt, dtype=np.int64))]
    for i, completion in enumerate(completions):
        ids = np.asarray(completion, dtype=np.int64)
        own = {"weights": np.ones(len(ids), dtype=np.float32), **(streams[i] if streams else {})}
        segments.append(Segment(ids, parent=0, streams=own, marks=marks[i] if marks else NO_MARKS))
    return tuple(segments)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same tensor on `device`, without waiting for what a GPU still has to do."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory a copy waits
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Layout:
    """Where the segments of a stream lie, on the host, so that whoever plans over them waits for no device.

    starts, lengths, parents   a number a segment, in the order of the stream; parents are segments, -1 for roots
    positions                  int64 [T], position of each token on its path
    """

    starts: list[int]
    lengths: list[int]
    parents: list[int]
    positions: Array


@dataclass(frozen=True)
class TokenBatch:
    """A packed forest of trees. Build it with `collate`.

    tokens_T         int64, the stream
    positions_T      int64, position of each token on its path from the root (a child continues its parent)
    segments_T       int64, segment of each token
    predictors_T     int64, stream index of the token before it on its path; -1 for the first token of a root
    starts_S, lengths_S, parents_S, trees_S   int64; parents are segment indices, -1 for roots
    targets_N        int64, stream indices of the tokens with weight other than zero
    streams          name -> [T] or [T, K]; "weights" is always there
    marks            name -> [S] float32, NaN where a segment has no such mark
    layout           starts, lengths, parents and positions once more, on the host
    seed             for objectives that draw random numbers (the shuffled control)
    """

    tokens_T: Tensor
    positions_T: Tensor
    segments_T: Tensor
    predictors_T: Tensor
    starts_S: Tensor
    lengths_S: Tensor
    parents_S: Tensor
    trees_S: Tensor
    targets_N: Tensor
    streams: Mapping[str, Tensor]
    marks: Mapping[str, Tensor]
    layout: Layout
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.shape[0])

    @property
    def num_segments(self) -> int:
        return int(self.starts_S.shape[0])

    @property
    def num_targets(self) -> int:
        return int(self.targets_N.shape[0])

    def at_targets(self, name: str) -> Tensor:
        """The stream `name` at the target tokens, shape [N] or [N, K]."""
        if name not in self.streams:
            raise KeyError(f"the batch has no stream {name!r}; it has {sorted(self.streams)}")
        return self.streams[name][self.targets_N]

    @property
    def ends_S(self) -> Tensor:
        """Stream index of the last token of each segment; one before its start where it is empty."""
        return self.starts_S + self.lengths_S - 1

    @property
    def target_predictors_N(self) -> Tensor:
        return self.predictors_T[self.targets_N]

    @property
    def target_tokens_N(self) -> Tensor:
        return self.tokens_T[self.targets_N]

    @property
    def target_segments_N(self) -> Tensor:
        return self.segments_T[self.targets_N]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            name: send(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        streams = {name: send(value, device) for name, value in self.streams.items()}
        marks = {name: send(value, device) for name, value in self.marks.items()}
        return replace(self, **moved, streams=streams, marks=marks)

    def with_streams(self, **streams: Tensor) -> TokenBatch:
        """The same batch with more (or other) streams, each [T] or [T, K]."""
        return replace(self, streams={**self.streams, **streams})


@dataclass(frozen=True)
class Scores:
    """What the engine knows about the targets of a batch; the input of every objective.

    logprobs_N      float32, log p(target | its path), natural logarithm
    entropy_N       float32, entropy of the predicting distribution in nats; None unless asked for
    candidates_NK   float32, log p of the candidate tokens asked for; None unless asked for
    collisions_N    float32, log of the sum of squares of the predicting distribution (how likely two samples are the
                    same token), without a gradient; None unless asked for
    values_TL       float32, what a scalar model (reward model, critic) gives at every token of the stream, a column a
                    label; None unless asked for. Such a model has no vocabulary: `logprobs_N` is then empty, [0].
                    A reward is read at the end of an answer (`TokenBatch.ends_S`), a critic's value of the state in
                    which a target was chosen at `target_predictors_N`
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None = None
    candidates_NK: Tensor | None = None
    collisions_N: Tensor | None = None
    values_TL: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A quantity to be averaged over a whole update: `total / count`. `total` may be a vector (a histogram)."""

    total: Tensor
    count: Tensor | float


@dataclass(frozen=True)
class Loss:
    """What an objective returns: the sum over the batch, and the denominator that belongs to it.

    The loop adds up both over micro-batches (and ranks) and divides once, so that the split never changes the result.
    """

    total: Tensor
    denominator: Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What an objective needs from the engine. `candidates` names the int stream [T, K] of token ids to score;
    `embedding_noise` is NEFTune's alpha: the scores are those under noisy input embeddings (0 = plain).

    `values` asks for values at every token, of a scalar model (`polm.models.heads`); nothing else can be asked of it.
    """

    entropy: bool = False
    candidates: str | None = None
    collisions: bool = False
    embedding_noise: float = 0.0
    values: bool = False


@dataclass(frozen=True)
class Step:
    """The micro-batches of one update, and what their source measured while it made them."""

    batches: Sequence[TokenBatch]
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A pure function over scores, with what it reads: streams of the batch, and scores from the engine.

    `linear` says that the total is a constant plus a sum of `logprobs_N` and `candidates_NK`, each times a slope that
    the batch alone decides: the head's gradient can then be computed in its forward pass.
    """

    name: str
    compute: Callable[[Scores, TokenBatch], Loss]
    needs: Needs = field(default_factory=Needs)
    reads: tuple[str, ...] = ("weights",)
    linear: bool = False


def collate(trees: Iterable[Tree], *, seed: int = 0) -> TokenBatch:
    """Pack trees one after another into a stream.

    Streams that a segment lacks are filled with zeros. The first token of a root has no predictor: its weight is
    set to zero here. Raises DataError for an empty batch or an empty root.
    """
    segments: list[tuple[Segment, int, int]] = []  # (segment, parent in the stream, tree)
    for number, tree in enumerate(trees):
        base = len(segments)
        for index, segment in enumerate(tree):
            if segment.parent >= index:
                raise DataError(f"segment {index} names parent {segment.parent}: parents must stand before children")
            if segment.parent < 0 and len(segment) == 0:
                raise DataError("a tree's root is empty: a prompt or document needs at least one token")
            segments.append((segment, base + segment.parent if segment.parent >= 0 else -1, number))
    if not segments:
        raise DataError("an empty batch: no tree was given to collate")
    lengths = np.array([len(s) for s, _, _ in segments], dtype=np.int64)
    parents = np.array([p for _, p, _ in segments], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    positions, predictors = _compute_paths(starts, lengths, parents)
    streams = _concatenate_streams([s for s, _, _ in segments], lengths)
    streams["weights"][predictors < 0] = 0.0
    return TokenBatch(
        tokens_T=torch.from_numpy(np.concatenate([s.tokens for s, _, _ in segments]).astype(np.int64)),
        positions_T=torch.from_numpy(positions),
        segments_T=torch.from_numpy(np.repeat(np.arange(len(segments)), lengths)),
        predictors_T=torch.from_numpy(predictors),
        starts_S=torch.from_numpy(starts),
        lengths_S=torch.from_numpy(lengths),
        parents_S=torch.from_numpy(parents),
        trees_S=torch.from_numpy(np.array([t for _, _, t in segments], dtype=np.int64)),
        targets_N=torch.from_numpy(np.flatnonzero(streams["weights"])),
        streams={name: torch.from_numpy(value) for name, value in streams.items()},
        marks=_collect_marks([s for s, _, _ in segments]),
        layout=Layout(starts.tolist(), lengths.tolist(), parents.tolist(), positions),
        seed=seed,
    )


def _compute_paths(starts: Array, lengths: Array, parents: Array) -> tuple[Array, Array]:
    """Positions and predictors of every token. An empty segment hands its parent's end on to its children."""
    total = int(lengths.sum())
    positions = np.empty(total, dtype=np.int64)
    predictors = np.arange(-1, total - 1, dtype=np.int64)
    end_position = np.empty(len(starts), dtype=np.int64)  # position after the segment's last token
    last_token = np.empty(len(starts), dtype=np.int64)  # stream index of the last token on the path
    for s, (start, length, parent) in enumerate(zip(starts, lengths, parents, strict=True)):
        first = end_position[parent] if parent >= 0 else 0
        before = last_token[parent] if parent >= 0 else -1
        positions[start : start + length] = np.arange(first, first + length)
        if length:
            predictors[start] = before
        end_position[s] = first + length
        last_token[s] = start + length - 1 if length else before
    return positions, predictors


def _concatenate_streams(segments: Sequence[Segment], lengths: Array) -> dict[str, Array]:
    """Each stream over the whole batch, zeros where a segment lacks it."""
    total = int(lengths.sum())
    out: dict[str, Array] = {"weights": np.zeros(total, dtype=np.float32)}
    offset = 0
    for segment, length in zip(segments, lengths, strict=True):
        for name, value in segment.streams.items():
            if len(value) != length:
                raise DataError(f"stream {name!r} has {len(value)} entries for a segment of {length} tokens")
            if name not in out:
                dtype = np.int64 if np.issubdtype(value.dtype, np.integer) else np.float32
                out[name] = np.zeros((total, *value.shape[1:]), dtype=dtype)
            out[name][offset : offset + length] = value
        offset += int(length)
    return out


def _collect_marks(segments: Sequence[Segment]) -> dict[str, Tensor]:
    names = sorted({name for segment in segments for name in segment.marks})
    return {
        name: torch.tensor([float(s.marks.get(name, float("nan"))) for s in segments], dtype=torch.float32)
        for name in names
    }
