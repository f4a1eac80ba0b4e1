"""Scores of a frozen model over trees, as flat arrays in the order of the trees; computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from polm.data.packing import pack_best_fit
from polm.data.tree_store import measure_trees
from polm.engine.score import score, score_top_k
from polm.tokens import Array, Needs, TokenBatch, Tree, collate


@dataclass(frozen=True)
class Annotation:
    """Over all tokens of all trees: log-probabilities [total], zero where nothing predicts the token or the data
    does not supervise it; with `top_k`, ids and log-probabilities [total, K] of the likeliest tokens there."""

    logprobs: Array
    top_ids: Array | None = None
    top_logprobs: Array | None = None


@torch.no_grad()
def annotate_trees(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    *,
    bin_tokens: int,
    top_k: int = 0,
    bf16: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Annotation:
    """Score every supervised token of `trees` under a frozen model, in bins of at most `bin_tokens`.

    Trees of like length share a bin, so that attention pads little. `report` receives (bins done, bins).
    """
    total = int(measure_trees(trees).sum())
    out = Annotation(np.zeros(total, dtype=np.float32))
    if top_k:
        size = min(top_k, int(model.get_output_embeddings().weight.shape[0]))
        ids, values = np.zeros((total, size), dtype=np.int64), np.zeros((total, size), dtype=np.float32)
        out = replace(out, top_ids=ids, top_logprobs=values)
    model.eval()
    for batch, targets in _iterate_bins(trees, bin_tokens, str(model.device), report):
        if out.top_ids is None or out.top_logprobs is None:
            out.logprobs[targets] = score(model, batch, bf16=bf16).logprobs_N.cpu().numpy()
        else:
            logprobs, top_ids, top_logprobs = score_top_k(model, batch, top_k, bf16=bf16)
            out.logprobs[targets] = logprobs.cpu().numpy()
            out.top_ids[targets], out.top_logprobs[targets] = top_ids.cpu().numpy(), top_logprobs.cpu().numpy()
    return out


@torch.no_grad()
def compute_tree_values(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    *,
    bin_tokens: int,
    bf16: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Array:
    """Values of a frozen scalar model at the target tokens of `trees`, in their order: float32 [targets, labels].

    Bins and `report` are those of `annotate_trees`.
    """
    total = int(measure_trees(trees).sum())
    values: Array | None = None
    is_target = np.zeros(total, dtype=np.bool_)
    model.eval()
    for batch, targets in _iterate_bins(trees, bin_tokens, str(model.device), report):
        values_TL = score(model, batch, Needs(values=True), bf16=bf16).values_TL
        assert values_TL is not None
        found = values_TL[batch.targets_N].cpu().numpy()
        values = np.zeros((total, found.shape[1]), dtype=np.float32) if values is None else values
        values[targets], is_target[targets] = found, True
    return np.zeros((0, 1), dtype=np.float32) if values is None else values[is_target]


def _iterate_bins(
    trees: Sequence[Tree], bin_tokens: int, device: str, report: Callable[[int, int], None] | None
) -> Iterator[tuple[TokenBatch, Array]]:
    """Batches over all trees, and the place of each of their targets among all tokens of all trees."""
    lengths = measure_trees(trees)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    bins = pack_best_fit(lengths, max(bin_tokens, int(lengths.max(initial=1))), np.argsort(-lengths, kind="stable"))
    for done, members in enumerate(bins, start=1):
        batch = collate(trees[i] for i in members)
        places = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in members])
        yield batch.to(device), places[batch.targets_N.numpy()]
        if report is not None:
            report(done, len(bins))
