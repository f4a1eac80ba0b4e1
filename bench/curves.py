"""Cost curves: how polm's time grows with one size, beside the growth of the operations counted from the shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.flops import read_cost
from bench.setup import SHAPES, draw_tokens, model_folder
from polm.engine.device import pick_device
from polm.engine.fit import accumulate
from polm.models.loading import load_model
from polm.objectives.ntp import build_ntp
from polm.tokens import Tree, build_completions, build_document, collate

MODEL = "10m"  # unless another is asked for
Case = tuple[int, list[Tree], dict[str, Any]]  # size, trees, changes of the model


def segment_lengths(vocab: int) -> list[Case]:
    """Time per token against the length of the segments, 8,192 tokens in all."""
    rng = np.random.default_rng(0)
    sizes = [64, 256, 1024, 2048, 4096, 8192]
    return [(n, [build_document(draw_tokens(rng, vocab, n)) for _ in range(max(1, 4096 // n))], {}) for n in sizes]


def group_sizes(vocab: int) -> list[Case]:
    """Time per target against the number of answers that share a prompt of 512 tokens; answers of 64."""
    rng = np.random.default_rng(0)
    return [
        (n, [build_completions(draw_tokens(rng, vocab, 512), [draw_tokens(rng, vocab, 64) for _ in range(n)])], {})
        for n in (1, 2, 4, 8, 16, 32, 64)
    ]


def vocabularies(vocab: int) -> list[Case]:
    """Time per token against the vocabulary; 1,024 tokens, each a target."""
    rng = np.random.default_rng(0)
    return [
        (size, [build_document(draw_tokens(rng, vocab, 128)) for _ in range(8)], {"vocab_size": size})
        for size in (8192, 32768, 65536, 131072, 262144)
    ]


def bin_sizes(vocab: int) -> list[Case]:
    """Time per token against the tokens in a forward pass; segments of 128."""
    rng = np.random.default_rng(0)
    sizes = [256, 512, 1024, 2048, 4096, 8192]
    return [(n, [build_document(draw_tokens(rng, vocab, 128)) for _ in range(n // 128)], {}) for n in sizes]


CURVES: dict[str, tuple[Callable[[int], list[Case]], str, str]] = {
    "segment": (segment_lengths, "tokens of a segment", "token"),
    "group": (group_sizes, "answers of a prompt", "target"),
    "vocabulary": (vocabularies, "vocabulary", "token"),
    "bin": (bin_sizes, "tokens of a bin", "token"),
}


def measure(name: str, shape: str, threads: int, precision: str, repeats: int = 3) -> list[dict[str, Any]]:
    """Milliseconds per token (or target) of forward and backward, median of a few; and the operations of each."""
    torch.set_num_threads(threads)
    build, _, per = CURVES[name]
    out = []
    for size, trees, changes in build(SHAPES[shape]["vocab_size"]):
        model = load_model(model_folder(shape, **changes), device=pick_device()).train()
        batch = collate(trees)
        seconds = []
        for repeat in range(repeats + 1):
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            accumulate(model, [batch], build_ntp(), 1.0, precision == "bf16")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds.append(time.perf_counter() - began)
        count = batch.num_tokens if per == "token" else batch.num_targets
        flops = read_cost(model).of_batch(batch, training=True)
        out.append({"model": shape, "size": size, "ms": 1e3 * median(seconds) / count, "mflop": flops / count / 1e6})
        print(f"  {name} {size}: {out[-1]['ms']:.3f} ms, {out[-1]['mflop']:.1f} MFLOP per {per}", flush=True)
    return out


def describe(name: str, points: Sequence[dict[str, Any]]) -> str:
    """A table with the growth relative to a middle row."""
    _, what, per = CURVES[name]
    unit = points[2]
    lines = [
        f"### Time per {per} against {what} ({unit.get('model', MODEL)})\n",
        f"| {what} | ms per {per} | growth | expected growth | GF/s |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        mark = " *" if point is unit else ""
        lines.append(
            f"| {point['size']:,}{mark} | {point['ms']:.3f} | {point['ms'] / unit['ms']:.2f} "
            f"| {point['mflop'] / unit['mflop']:.2f} | {point['mflop'] / point['ms']:.1f} |"
        )
    return "\n".join(lines)
