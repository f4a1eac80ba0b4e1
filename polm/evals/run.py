"""Answer benchmark items with a model, judge the answers, and sum up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.data.benchmarks import BenchmarkItem
from polm.data.examples import encode_prompt
from polm.data.packing import pack_best_fit
from polm.engine.score import score
from polm.evals.statistics import compute_pass_at_k
from polm.recipe import EvalSettings
from polm.rewards.verify import Verdict, VerifyItem, verify_many
from polm.rollout.generate import Completion, SamplingParams, generate
from polm.text.chat import render_chat, render_prompt, stop_token_ids
from polm.tokens import Array, Tree, build_completions, collate, tree_length

LIKELIHOOD_BIN = 4096


def encode_item(tokenizer: PreTrainedTokenizerFast, item: BenchmarkItem, form: str) -> tuple[Array, Array]:
    """(prompt ids, ids of the reference solution with its end token) in the plain or the chat form."""
    if form == "chat":
        messages = [{"role": "user", "content": item.prompt}]
        prompt = render_prompt(tokenizer, messages)
        whole = render_chat(tokenizer, [*messages, {"role": "assistant", "content": item.solution}]).token_ids
        return prompt, whole[len(prompt) :]
    rest = tokenizer(" " + item.solution, add_special_tokens=False)["input_ids"]
    return encode_prompt(tokenizer, item.prompt), np.array([*rest, tokenizer.eos_token_id], dtype=np.int64)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    benchmarks: Mapping[str, Sequence[BenchmarkItem]],
    settings: EvalSettings,
    *,
    bf16: bool,
    report: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """One row per item: texts, verdicts, and the summed negative log-likelihood (nats) of its solution."""
    items = [(name, item) for name, members in benchmarks.items() for item in members]
    encoded = [encode_item(tokenizer, item, settings.format) for _, item in items]
    prompts = [prompt for prompt, _ in encoded]
    stops = stop_token_ids(tokenizer) if settings.format == "chat" else (int(tokenizer.eos_token_id),)
    in_steps = settings.samples if settings.not_first else 0
    total = len(items) * (1 + settings.samples + in_steps)

    def sample(temperature: float, num_samples: int, offset: int, not_first: tuple[int, ...] = ()) -> list[Completion]:
        params = SamplingParams(
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            top_p=settings.top_p if temperature else 1.0,
            num_samples=num_samples,
            seed=settings.seed,
            stop_token_ids=stops,
            not_first=not_first,
        )
        progress = lambda done, _: report(offset + done, total)  # noqa: E731
        return generate(model, tokenizer, prompts, params, bf16=bf16, progress=progress)

    greedy = sample(0.0, 1, 0)
    greedy_verdicts = _judge(items, greedy, settings.time_limit)
    sampled = sample(settings.temperature, settings.samples, len(items)) if settings.samples else []
    sampled_verdicts = _judge(items, sampled, settings.time_limit)
    banned = find_first_tokens(tokenizer, settings.not_first)
    stepped = sample(settings.temperature, in_steps, len(items) * (1 + settings.samples), banned) if in_steps else []
    stepped_verdicts = _judge(items, stepped, settings.time_limit)
    nlls = compute_likelihoods(model, [build_completions(p, [s]) for p, s in encoded], bf16=bf16)
    rows = []
    for i, (name, item) in enumerate(items):
        mine = range(i * settings.samples, (i + 1) * settings.samples)
        row: dict[str, Any] = {
            "benchmark": name,
            "id": item.id,
            "prompt": item.prompt,
            "answer": item.answer,
            "greedy_text": greedy[i].text,
            "greedy_status": greedy_verdicts[i].status,
            "greedy_correct": int(greedy_verdicts[i].status == "right"),
            "samples_correct": [int(sampled_verdicts[j].status == "right") for j in mine],
            "samples_text": [sampled[j].text for j in mine],
            "nll": nlls[i],
            "nll_tokens": len(encoded[i][1]),
        }
        if in_steps:
            row["steps_correct"] = [int(stepped_verdicts[j].status == "right") for j in mine]
            row["steps_text"] = [stepped[j].text for j in mine]
        rows.append(row)
    return rows


def find_first_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[int, ...]:
    """The tokens with which an answer begins that begins with one of `texts`, with or without a space before it."""
    spellings = [form for text in texts for form in (text, " " + text)]
    return tuple(sorted({int(tokenizer(form, add_special_tokens=False)["input_ids"][0]) for form in spellings}))


def _judge(
    items: Sequence[tuple[str, BenchmarkItem]], completions: Sequence[Completion], time_limit: float
) -> list[Verdict]:
    pairs = [(items[c.prompt_index][1], c.text) for c in completions]
    return verify_many([VerifyItem(i.verifier, t, i.answer, i.numbers) for i, t in pairs], seconds=time_limit)


@torch.no_grad()
def compute_likelihoods(model: PreTrainedModel, trees: Sequence[Tree], *, bf16: bool) -> list[float]:
    """Negative log-likelihood in nats of each tree's targets, summed."""
    lengths = [tree_length(tree) for tree in trees]
    order = sorted(range(len(trees)), key=lambda i: (-lengths[i], i))
    out = [0.0] * len(trees)
    model.eval()
    for members in pack_best_fit(lengths, max(LIKELIHOOD_BIN, max(lengths)), order):
        batch = collate(trees[i] for i in members).to(model.device)
        logprobs = score(model, batch, bf16=bf16).logprobs_N.double()
        sums = torch.zeros(len(members), dtype=torch.float64, device=model.device)
        sums.index_add_(0, batch.trees_S[batch.target_segments_N], -logprobs)
        for place, value in zip(members, sums.tolist(), strict=True):
            out[place] = value
    return out


def summarise(rows: Sequence[Mapping[str, Any]], settings: EvalSettings) -> dict[str, Any]:
    """results.json: per benchmark, and the plain mean over benchmarks."""
    by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_name[row["benchmark"]].append(row)
    benchmarks = {name: _summarise_one(members, settings) for name, members in by_name.items()}
    mean: dict[str, Any] = {}
    for key in ("greedy", "pass@1", "nll", *(("steps@1",) if settings.not_first else ())):
        values = [b[key] for b in benchmarks.values() if b[key] is not None]
        mean[key] = float(np.mean(values)) if values else None
    mean["pass@k"] = {
        k: float(np.mean([b["pass@k"][k] for b in benchmarks.values()]))
        for k in next(iter(benchmarks.values()))["pass@k"]
    }
    return {"format": settings.format, "benchmarks": benchmarks, "mean": mean}


def _summarise_one(rows: Sequence[Mapping[str, Any]], settings: EvalSettings) -> dict[str, Any]:
    counts = [(len(r["samples_correct"]), sum(r["samples_correct"])) for r in rows]
    pass_k = {
        str(k): float(np.mean([compute_pass_at_k(n, c, k) for n, c in counts]))
        for k in (settings.pass_k if settings.samples else ())
    }
    steps = [float(np.mean(r["steps_correct"])) for r in rows if r.get("steps_correct")]
    return {
        "num_items": len(rows),
        "steps@1": float(np.mean(steps)) if steps else None,
        "greedy": float(np.mean([r["greedy_correct"] for r in rows])),
        "pass@1": float(np.mean([c / n for n, c in counts])) if settings.samples else None,
        "pass@k": pass_k,
        "nll": sum(r["nll"] for r in rows) / sum(r["nll_tokens"] for r in rows),
        "unparsed": float(np.mean([r["greedy_status"] == "unparsed" for r in rows])),
    }
