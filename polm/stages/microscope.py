"""`polm microscope`: which tokens a reference lifts and damps, before anything is trained.

It scores a sample of mid-training documents and some benchmark solutions under the reference and under the base, and
computes the weights that mid-training gives at its first update, by the functions of training itself.

Shape suffix: N target tokens of all texts, which are a segment each.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from polm.data.benchmarks import read_benchmark_folder
from polm.data.examples import Ledger, cut_document, encode_document
from polm.data.files import read_rows
from polm.data.normalise import require_columns
from polm.data.packing import epoch_order
from polm.data.readers import write_jsonl
from polm.engine.annotate import Annotation, annotate_trees
from polm.engine.device import use_bf16
from polm.errors import DataError
from polm.evals.run import encode_item
from polm.objectives.remit import NUM_BINS, compute_delta, compute_weight_histogram
from polm.recipe import MicroscopeSettings, is_plausible
from polm.signals.token_weights import (
    compute_plausible_weights,
    compute_remit_weights,
    compute_rho1_selection,
    compute_shuffled,
)
from polm.stages.common import (
    Base,
    Context,
    Stage,
    StageResult,
    attach_annotation,
    free_memory,
    input_file,
    load_annotation,
    load_base,
    new_ledger,
    start_stage,
)
from polm.text.tokenizer import require_same_tokenizer
from polm.tokens import Array, Scores, TokenBatch, Tree, build_document, collate, tree_length

NO_SOURCE = "documents"  # the source of a document whose record names none
SCORE_BIN = 4096
CONTEXT_TOKENS = 4  # tokens before one that decide how it is spelled: spaces, characters of several bytes


@dataclass(frozen=True)
class Text:
    """A text to look at. `place` is its tree's number among all trees of the data set, -1 for a benchmark's."""

    kind: str
    label: str
    id: str
    tree: Tree
    place: int = -1
    num_prompt: int = 0

    @property
    def tokens(self) -> Array:
        return self.tree[0].tokens


@dataclass(frozen=True)
class Measured:
    """Of each target of a text (all tokens but the first), float32 [n - 1]; `weight` is None where there is none."""

    reference: Array
    base: Array
    delta: Array
    weight: Array | None


def run(settings: MicroscopeSettings, context: Context) -> StageResult:
    """Write microscope.jsonl (texts, token by token) and tokens.json (the vocabulary over the sample)."""
    start_stage(settings, context)
    base = load_base(context.inputs["base"])
    ledger = new_ledger()
    scored = Path(context.inputs["reference"]) / "scores.safetensors"
    top_k = int(is_plausible(settings.weighting, settings.shuffles))
    annotation = None
    if scored.is_file():
        every = read_texts(settings, context, base, ledger, max_tokens=None)
        trees = [text.tree for text in sorted(every, key=lambda text: text.place)]
        documents = take_tokens(every, settings.max_tokens)
        annotation = pick_scores(load_annotation(scored.parent, base.tokenizer, trees, top_k), trees, documents)
        solutions: list[Text] = []  # an annotation has no scores of benchmarks
        ledger["solutions_without_scores"] = 1
    else:
        documents = read_texts(settings, context, base, ledger, max_tokens=settings.max_tokens)
        solutions = read_solutions(settings, context, base)
    ledger["documents"], ledger["solutions"] = len(documents), len(solutions)
    measured = _measure_all(settings, context, base, [documents, solutions], annotation)
    of_documents, of_solutions = measured[: len(documents)], measured[len(documents) :]
    shown = [(documents[i], of_documents[i]) for i in choose_shown(documents, settings.num_documents)]
    shown += list(zip(solutions, of_solutions, strict=True))
    rows = [build_row(base.tokenizer, text, one, settings.max_shown) for text, one in shown]
    write_jsonl(context.workdir / "microscope.jsonl", rows)
    tables = build_tables(settings, base.tokenizer, documents, of_documents)
    temporary = context.workdir / ".tokens.json.tmp"
    temporary.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    temporary.replace(context.workdir / "tokens.json")
    ledger["tokens_scored"] = tables["num_tokens"]
    numbers = {name: tables[name] for name in ("mean_weight", "mean_delta") if tables[name] is not None}
    return StageResult({"texts": len(rows), **numbers}, dict(ledger))


def read_texts(
    settings: MicroscopeSettings, context: Context, base: Base, ledger: Ledger, *, max_tokens: int | None
) -> list[Text]:
    """Mid-training documents in an order drawn from the seed, cut as mid-training cuts them, up to `max_tokens`.

    With max_tokens None it is all of them, and `place` numbers their trees in the order of the file.
    """
    path = input_file(context, "data", "midtrain.jsonl")
    rows = list(read_rows(path))
    limit = min(settings.bin_tokens, base.max_positions)
    firsts = {}  # number of the first tree of each document
    cut: dict[int, list[Tree]] = {}
    order = [int(i) for i in epoch_order(len(rows), settings.seed, 0)]
    total = number = 0
    for index in order if max_tokens is not None else range(len(rows)):
        line, row = rows[index]
        require_columns(f"{path}:{line}", row, ["text"])
        ids = encode_document(base.tokenizer, str(row["text"]))
        cut[index] = cut_document(ids, limit, settings.too_long, f"document {index}", ledger)
        firsts[index] = number
        number += len(cut[index])
        total += sum(map(tree_length, cut[index]))
        if max_tokens is not None and total >= max_tokens:
            break
    texts = [
        Text("document", str(rows[index][1].get("source", NO_SOURCE)), f"line {rows[index][0]}", tree, place)
        for index in order
        if index in cut
        for place, tree in enumerate(cut[index], start=firsts[index])
    ]
    if not texts:
        raise DataError(f"{path}: no document has two tokens within {limit} tokens; nothing to look at")
    return texts if max_tokens is None else take_tokens(texts, max_tokens)


def take_tokens(texts: Sequence[Text], max_tokens: int) -> list[Text]:
    """The first texts that together reach `max_tokens`; at least one."""
    taken: list[Text] = []
    total = 0
    for text in texts:
        if total >= max_tokens:
            break
        taken.append(text)
        total += len(text.tokens)
    return taken


def read_solutions(settings: MicroscopeSettings, context: Context, base: Base) -> list[Text]:
    """Prompt and solution of some items of each benchmark, as the plain documents that they would be."""
    folder = Path(context.inputs["data"]) / "benchmarks"
    if not settings.num_solutions or not folder.is_dir():
        return []
    texts = []
    for name, items in read_benchmark_folder(folder).items():
        for i in epoch_order(len(items), settings.seed, 0)[: settings.num_solutions]:
            prompt, solution = encode_item(base.tokenizer, items[i], "plain")
            ids = np.concatenate([prompt, solution])[: base.max_positions]
            texts.append(Text("benchmark", name, items[i].id, build_document(ids), num_prompt=len(prompt)))
    return texts


def choose_shown(texts: Sequence[Text], number: int) -> list[int]:
    """`number` texts, one of each source in turn, sources in the order of their names; within one in given order."""
    by_source: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        by_source[text.label].append(i)
    ranked = [(turn, label, i) for label, mine in by_source.items() for turn, i in enumerate(mine)]
    chosen = sorted(ranked)[:number]
    return [i for _, _, i in sorted(chosen, key=lambda one: (one[1], one[0]))]


def _measure_all(
    settings: MicroscopeSettings,
    context: Context,
    base: Base,
    groups: Sequence[Sequence[Text]],
    annotation: Annotation | None,
) -> list[Measured]:
    """Scores and weights of all texts, in order; documents and solutions are a batch each."""
    trees = [text.tree for group in groups for text in group]
    report = lambda done, total: context.report({"update": done, "num_updates": total})  # noqa: E731

    def annotate(one: Base, top_k: int = 0) -> Annotation:
        bf16 = use_bf16(settings.precision, one.model.device.type)
        return annotate_trees(one.model, trees, bin_tokens=SCORE_BIN, top_k=top_k, bf16=bf16, report=report)

    scores = annotate(base)
    other = annotation
    if other is None:
        reference = load_base(context.inputs["reference"])
        require_same_tokenizer(base.tokenizer, reference.tokenizer, base.name, reference.name)
        other = annotate(reference, int(is_plausible(settings.weighting, settings.shuffles)))
        free_memory()
    with_scores = attach_annotation(attach_annotation(trees, "base", scores), "ref", other)
    out: list[Measured] = []
    for group in groups:
        if group:
            out += measure(with_scores[len(out) : len(out) + len(group)], settings)
    return out


def pick_scores(annotation: Annotation, trees: Sequence[Tree], texts: Sequence[Text]) -> Annotation:
    """The part of a whole data set's scores that belongs to `texts`, by their places among its `trees`."""
    ends = np.cumsum([tree_length(tree) for tree in trees])
    places = np.concatenate([np.arange(ends[t.place] - len(t.tokens), ends[t.place]) for t in texts])
    ids, values = annotation.top_ids, annotation.top_logprobs
    if ids is None or values is None:
        return Annotation(annotation.logprobs[places])
    return Annotation(annotation.logprobs[places], ids[places], values[places])


def measure(trees: Sequence[Tree], settings: MicroscopeSettings) -> list[Measured]:
    """Delta and weight of every target of documents that carry the streams `ref_logprobs` and `base_logprobs`."""
    batch = collate(trees)
    base_N = batch.at_targets("base_logprobs")
    delta_N = compute_delta(Scores(base_N), batch, "frozen")
    weights_N = compute_weights(delta_N, batch, settings)
    ends = np.cumsum([tree_length(tree) - 1 for tree in trees])[:-1]
    reference, base, delta = (
        np.split(values_N.numpy(), ends) for values_N in (batch.at_targets("ref_logprobs"), base_N, delta_N)
    )
    weights = [None] * len(trees) if weights_N is None else np.split(weights_N.numpy(), ends)
    return [Measured(*one) for one in zip(reference, base, delta, weights, strict=True)]


def compute_weights(delta_N: torch.Tensor, batch: TokenBatch, settings: MicroscopeSettings) -> torch.Tensor | None:
    """The weights [N] that the arm's objective gives these differences; None for distill, which weights no token."""
    if settings.weighting == "distill":
        return None
    segments_N, num_segments = batch.target_segments_N, batch.num_segments
    if settings.weighting == "rho1":
        selected_N = compute_rho1_selection(delta_N, segments_N, num_segments, keep=settings.keep, scope=settings.scope)
        return selected_N.float()
    if is_plausible(settings.weighting, settings.shuffles):
        weights_N = compute_plausible_weights(
            batch.at_targets("ref_logprobs"),
            batch.at_targets("ref_topk")[:, 0],
            gamma=settings.gamma,
            floor=settings.floor,
        )
        return compute_shuffled(weights_N, settings.seed) if settings.weighting == "shuffled" else weights_N
    weights_N, _ = compute_remit_weights(
        delta_N,
        segments_N,
        num_segments,
        eps=settings.eps,
        temperature=settings.temperature,
        centring=settings.centring,
    )
    return compute_shuffled(weights_N, settings.seed) if settings.weighting == "shuffled" else weights_N


def build_row(tokenizer: PreTrainedTokenizerFast, text: Text, measured: Measured, max_shown: int) -> dict[str, Any]:
    """One line of microscope.jsonl; lists are as long as `tokens`, and the first token has no scores (null)."""
    ids = text.tokens.tolist()[:max_shown]

    def align(values: Array | None) -> list[float | None] | None:
        return None if values is None else [None, *(round(float(v), 4) for v in values[: len(ids) - 1])]

    return {
        "kind": text.kind,
        "label": text.label,
        "id": text.id,
        "num_tokens": len(text.tokens),
        "num_prompt": text.num_prompt,
        "tokens": spell_tokens(tokenizer, ids),
        "logp_ref": align(measured.reference),
        "logp_base": align(measured.base),
        "delta": align(measured.delta),
        "weight": align(measured.weight),
    }


def spell_tokens(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, spaces included; joined they are the text, but for split characters."""

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces = []
    for i in range(len(ids)):
        before = decode(ids[max(0, i - CONTEXT_TOKENS) : i])
        after = decode(ids[max(0, i - CONTEXT_TOKENS) : i + 1])
        same = next((k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        pieces.append(after[same:])
    return pieces


def name_token(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    """An entry of the vocabulary as text where that text stands for it, else as the vocabulary spells it."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    same = tokenizer(text, add_special_tokens=False)["input_ids"] == [token]
    return text if same else str(tokenizer.convert_ids_to_tokens(token))


def build_tables(
    settings: MicroscopeSettings,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[Text],
    measured: Sequence[Measured],
) -> dict[str, Any]:
    """tokens.json: means by token and by source over all targets, and the histogram of the weights over [0, 2]."""
    ids = np.concatenate([text.tokens[1:] for text in texts])
    delta = np.concatenate([one.delta for one in measured]).astype(np.float64)
    parts = [one.weight for one in measured if one.weight is not None]
    weight = np.concatenate(parts).astype(np.float64) if parts else None
    tokens = compute_means(ids, delta, weight)
    often = [(int(token), row) for token, row in tokens.items() if row["count"] >= settings.min_count]
    by = "delta" if weight is None else "weight"
    often.sort(key=lambda one: (-one[1][by], -one[1]["delta"], one[0]))
    half = min(settings.top, len(often) // 2)  # no token is both
    labels = sorted({text.label for text in texts})
    numbers = {label: i for i, label in enumerate(labels)}
    sources = np.repeat([numbers[text.label] for text in texts], [len(text.tokens) - 1 for text in texts])
    by_source = compute_means(sources, delta, weight)
    histogram = None if weight is None else compute_weight_histogram(torch.from_numpy(weight))
    return {
        "weighting": settings.weighting,
        "shuffles": settings.shuffles,
        "eps": settings.eps,
        "num_documents": len(texts),
        "num_tokens": len(ids),
        "num_entries": len(tokens),
        "min_count": settings.min_count,
        "mean_weight": None if weight is None else float(weight.mean()),
        "mean_delta": float(delta.mean()),
        "lifted": [{"token": name_token(tokenizer, token), **row} for token, row in often[:half]],
        "damped": [
            {"token": name_token(tokenizer, token), **row} for token, row in reversed(often[len(often) - half :])
        ],
        "sources": [{"source": labels[i], **row} for i, row in by_source.items()],
        "histogram": [0] * NUM_BINS if histogram is None else [int(n) for n in histogram],
    }


def compute_means(groups: Array, delta: Array, weight: Array | None) -> dict[int, dict[str, Any]]:
    """Count, mean weight (None without weights) and mean delta of each group number that occurs, ascending."""
    counts = np.bincount(groups)
    deltas = np.bincount(groups, delta)
    weights = None if weight is None else np.bincount(groups, weight)
    return {
        int(group): {
            "count": int(counts[group]),
            "weight": None if weights is None else float(weights[group] / counts[group]),
            "delta": float(deltas[group] / counts[group]),
        }
        for group in np.flatnonzero(counts)
    }


STAGE = Stage(
    "microscope",
    "produce",
    MicroscopeSettings,
    run,
    inputs=("base", "reference", "data"),
    version=2,
    summary="which tokens a reference lifts and damps",
)
