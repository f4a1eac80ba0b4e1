"""`polm eval`: greedy and sampled answers on benchmarks, and the held-out likelihood of their solutions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polm.data.benchmarks import BENCHMARKS, BenchmarkItem, read_benchmark, read_benchmark_folder
from polm.data.readers import write_json, write_jsonl
from polm.errors import DataError
from polm.evals.run import evaluate, summarise
from polm.recipe import EvalSettings
from polm.stages.common import Context, Stage, StageResult, load_sampler, start_stage


def run(settings: EvalSettings, context: Context) -> StageResult:
    """Evaluate `model` on the benchmarks of `data` into results.json and items.jsonl."""
    start_stage(settings, context)
    base, bf16 = load_sampler(context.inputs["model"], settings.precision)
    benchmarks = choose_benchmarks(Path(context.inputs["data"]), settings)
    rows = evaluate(
        base.model,
        base.tokenizer,
        benchmarks,
        settings,
        bf16=bf16,
        report=lambda done, total: context.report({"update": done, "num_updates": total}),
    )
    write_jsonl(context.workdir / "items.jsonl", rows)
    results = summarise(rows, settings)
    write_json(context.workdir / "results.json", results)
    statuses = {
        f"greedy_{status}": sum(r["greedy_status"] == status for r in rows)
        for status in ("right", "wrong", "unparsed", "timeout", "error")
    }
    return StageResult(flatten_mean(results["mean"]), {"items": len(rows), **statuses})


def flatten_mean(mean: Mapping[str, Any]) -> dict[str, float]:
    """The means of results.json as flat numbers, pass@k by its k; what was not measured stays out."""
    by_k = {f"mean/pass@{k}": value for k, value in mean["pass@k"].items()}
    flat = {f"mean/{name}": value for name, value in mean.items() if name != "pass@k" and value is not None}
    return by_k | flat


def choose_benchmarks(data: Path, settings: EvalSettings) -> dict[str, list[BenchmarkItem]]:
    """The benchmarks of a data set folder, or published ones (gsm8k, math, svamp, asdiv, mawps) from their files."""
    embedded = read_benchmark_folder(data / "benchmarks") if (data / "benchmarks").is_dir() else {}
    names = settings.benchmarks or tuple(sorted(embedded))
    chosen: dict[str, list[BenchmarkItem]] = {}
    for name in names:
        if name in embedded:
            chosen[name] = embedded[name]
        elif name in BENCHMARKS:
            chosen[name] = read_benchmark(name, data)
        else:
            known = ", ".join([*sorted(embedded), *sorted(BENCHMARKS)])
            raise DataError(f"no benchmark {name!r} in {data}; there are: {known}")
    if not chosen:
        raise DataError(f"{data} has no benchmarks/ folder; name published ones, for example benchmarks=[gsm8k]")
    limit = settings.num_items
    return {name: items[:limit] if limit else items for name, items in chosen.items()}


STAGE = Stage(
    "eval",
    "produce",
    EvalSettings,
    run,
    inputs=("model", "data"),
    version=2,
    summary="benchmarks and likelihood",
)
