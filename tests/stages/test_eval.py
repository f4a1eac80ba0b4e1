"""`polm eval`: its numbers against a recount of its own items."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polm.data.benchmarks import read_benchmark_folder
from polm.errors import DataError
from polm.evals import run as evals
from polm.models.loading import load_model, load_tokenizer
from polm.recipe import EvalSettings
from polm.rewards.verify import Verdict
from polm.stages.common import load_sampler


@pytest.fixture(scope="module")
def judged(artifact: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation with made-up verdicts, so that there is something to count."""
    out = tmp_path_factory.mktemp("eval") / "out"

    def judge(items: Any, *, seconds: float) -> list[Verdict]:
        del seconds
        names = ("right", "wrong", "unparsed")
        return [Verdict(names[(i // 2) % 3], "") for i, _ in enumerate(items)]  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "verify_many", judge)
        settings = EvalSettings(samples=3, pass_k=(1, 2, 3), max_new_tokens=8, precision="fp32", seed=1)
        artifact.run("eval", settings, artifact.inputs("eval"), out)
    return out


def test_results_are_a_recount_of_the_items(judged: Path, read_rows: Any, read_manifest: Any) -> None:
    rows = read_rows(judged / "items.jsonl")
    results = json.loads((judged / "results.json").read_text())
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_name[row["benchmark"]].append(row)
    assert results["benchmarks"].keys() == by_name.keys()
    assert len(by_name) == 10
    assert {row["greedy_status"] for row in rows} == {"right", "wrong", "unparsed"}
    means = defaultdict(list)
    for name, members in by_name.items():
        found = results["benchmarks"][name]
        assert found["num_items"] == len(members)
        assert found["greedy"] == np.mean([row["greedy_status"] == "right" for row in members])
        assert found["unparsed"] == np.mean([row["greedy_status"] == "unparsed" for row in members])
        assert found["pass@1"] == pytest.approx(np.mean([np.mean(row["samples_correct"]) for row in members]))
        # All three samples: at least one is right.
        assert found["pass@k"]["3"] == np.mean([any(row["samples_correct"]) for row in members])
        assert found["pass@k"]["1"] == pytest.approx(found["pass@1"])
        assert found["pass@k"]["1"] <= found["pass@k"]["2"] <= found["pass@k"]["3"]
        assert found["nll"] == pytest.approx(sum(r["nll"] for r in members) / sum(r["nll_tokens"] for r in members))
        for key in ("greedy", "pass@1", "nll"):
            means[key].append(found[key])
    for key, values in means.items():
        assert results["mean"][key] == pytest.approx(np.mean(values))
    summary = read_manifest(judged)["summary"]
    assert set(summary) == {f"mean/{name}" for name in ("greedy", "pass@1", "pass@2", "pass@3", "nll")}
    assert summary["mean/pass@3"] == results["mean"]["pass@k"]["3"]
    assert summary["mean/pass@1"] == results["mean"]["pass@1"]
    for row in rows:
        assert row["greedy_correct"] == int(row["greedy_status"] == "right")
        assert len(row["samples_correct"]) == len(row["samples_text"]) == 3
    ledger = read_manifest(judged)["ledger"]
    assert ledger["items"] == len(rows) == sum(v for k, v in ledger.items() if k.startswith("greedy_"))
    assert ledger["greedy_right"] == sum(row["greedy_correct"] for row in rows)


@pytest.mark.parametrize("form", ["plain", "chat"])
def test_likelihoods_against_the_plain_model(artifact: Any, tmp_path: Path, read_rows: Any, form: str) -> None:
    """The summed negative log-likelihood of each solution, from an ordinary forward pass over its text."""
    settings = EvalSettings(format=form, samples=0, max_new_tokens=1, precision="fp32")  # type: ignore[arg-type]
    manifest = artifact.run("eval", settings, artifact.inputs("eval"), tmp_path / "out")
    assert set(manifest["summary"]) == {"mean/greedy", "mean/nll"}  # nothing was sampled
    model = load_model(artifact("grpo") / "model").eval()
    model.set_attn_implementation("sdpa")
    tokenizer = load_tokenizer(artifact("grpo") / "model")
    items = {
        item.id: item for members in read_benchmark_folder(artifact("data") / "benchmarks").values() for item in members
    }
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    rows = read_rows(tmp_path / "out" / "items.jsonl")
    for row in rows:
        item = items[row["id"]]
        solution = [*encode(item.solution), tokenizer.eos_token_id]
        prompt = encode(item.prompt)
        if form == "chat":
            prompt = [*encode("<|user|>"), *prompt, *encode("<|assistant|>")]
        ids = torch.tensor([prompt + solution])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
        expected = -float(logp[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum())
        assert row["nll"] == pytest.approx(expected, rel=1e-4)
        assert row["nll_tokens"] == len(solution)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["format"] == form
    assert results["mean"]["pass@1"] is None
    assert results["mean"]["pass@k"] == {}


def test_some_benchmarks_and_some_items(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    settings = EvalSettings(benchmarks=("sort", "add"), num_items=1, samples=0, max_new_tokens=1)
    artifact.run("eval", settings, artifact.inputs("eval"), tmp_path / "out")
    assert [row["benchmark"] for row in read_rows(tmp_path / "out" / "items.jsonl")] == ["sort", "add"]


def test_benchmarks_that_are_not_there(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no benchmark 'sorting' in .*; there are: add, "):
        artifact.run("eval", EvalSettings(benchmarks=("sorting",)), artifact.inputs("eval"), tmp_path / "a")
    inputs = {"model": str(artifact("grpo")), "data": str(artifact("pairs"))}
    with pytest.raises(DataError, match=r"has no benchmarks/ folder; name published ones"):
        artifact.run("eval", EvalSettings(), inputs, tmp_path / "b")


def test_answers_whose_form_is_fixed(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    settings = EvalSettings(
        samples=2, pass_k=(1,), max_new_tokens=8, num_items=5, format="plain", precision="fp32", not_first=("####",)
    )
    artifact.run("eval", settings, artifact.inputs("eval"), tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "items.jsonl")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(not text.startswith("####") for row in rows for text in row["steps_text"])
    assert all(len(row["steps_correct"]) == 2 for row in rows)
    by_name: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_name[row["benchmark"]].append(float(np.mean(row["steps_correct"])))
    assert results["mean"]["steps@1"] == pytest.approx(np.mean([np.mean(values) for values in by_name.values()]))


def test_a_fixed_form_needs_samples() -> None:
    with pytest.raises(ValueError, match="not_first is for sampled answers"):
        EvalSettings(samples=0, pass_k=(), not_first=("####",))


def test_in_bf16_the_model_is_read_in_bf16_alone(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """Its numbers are near those of float32, on the likelihoods too, whose head is the one of training."""
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        base, bf16 = load_sampler(artifact.inputs("eval")["model"], precision)
        assert bf16 is (precision == "bf16")
        assert base.model.get_input_embeddings().weight.dtype == dtype
        settings = EvalSettings(samples=1, pass_k=(1,), max_new_tokens=4, num_items=2, precision=precision, seed=1)
        artifact.run("eval", settings, artifact.inputs("eval"), tmp_path / precision)
    exact, rounded = (read_rows(tmp_path / precision / "items.jsonl") for precision in ("fp32", "bf16"))
    assert [row["nll"] for row in rounded] == pytest.approx([row["nll"] for row in exact], rel=0.02)
