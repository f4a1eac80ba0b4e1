"""The benchmark's own arithmetic: operations by hand, ratios of neighbouring repetitions, the page from the rows. A
whole comparison of a tiny model runs where TRL is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as bench
from bench import channel, curves, polm_side, report
from bench.flops import Cost, decode_pairs
from bench.setup import Spec, answer_lengths, draw_lengths, instructions
from polm.tokens import build_completions, collate


def test_operations_by_hand() -> None:
    """A prompt of 2 tokens and two answers of 1 and 2: positions 0 1, 2, 2 3, so 1+2, 3, 3+4 pairs = 13; 3 targets."""
    batch = collate([build_completions(np.array([5, 6]), [np.array([7]), np.array([8, 9])])])
    cost = Cost(body=10, num_layers=2, attention_width=4, head=100)
    forward = 2 * 10 * 5 + 4 * 4 * 2 * 13 + 2 * 100 * 3
    assert cost.of_batch(batch, training=False) == forward
    assert cost.of_batch(batch, training=True) == 3 * forward
    # A prompt of 3 and 2 new tokens: 4 tokens are fed, which see 1, 2, 3 and 4.
    assert decode_pairs(3, 2) == 10


def test_lengths_are_lognormal_and_cut() -> None:
    lengths = draw_lengths(np.random.default_rng(0), 20_000, 120, 0.8, 8, 512)
    assert lengths.min() >= 8
    assert lengths.max() == 512
    assert lengths.mean() == pytest.approx(116, rel=0.05)  # the cut takes a little off
    assert max(answer_lengths(64, 0)) > 3 * np.mean(answer_lengths(64, 0))
    prompt, answer = instructions(100, 5, 0)[3]
    assert len(prompt) >= 2
    assert answer[-1] == 1


def test_ratios_are_of_neighbours() -> None:
    numbers = bench.build_numbers([10.0, 20.0, 30.0], [5.0, 5.0, 30.0])
    assert numbers["ratio"] == 2.0  # of 2, 4 and 1; the ratio of the medians would be 4
    assert numbers["polm_median"] == 20.0
    assert numbers["ratio_range"] == [1.0, 4.0]


def test_the_meter_measures_whole_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(channel.time, "perf_counter", lambda: next(clock))
    sent: list[dict[str, Any]] = []

    class Fake:
        def send(self, **values: Any) -> None:
            sent.append(values)

        def wait(self) -> None:
            if len(sent) == 4:
                raise channel.Done

    meter = channel.Meter(Fake(), seconds=3.0, warmup=2, guard=0.5)  # type: ignore[arg-type]
    for _ in range(10):
        meter.tick(units=2.0)
    with pytest.raises(channel.Done):
        meter.tick(units=2.0)
    assert sent[0] == {"ready": True, "guard": 0.5, "steps_per_repeat": 3}
    assert [s["units"] for s in sent[1:]] == [6.0, 6.0, 6.0]
    assert [s["seconds"] for s in sent[1:]] == [3.0, 3.0, 3.0]


def test_different_work_is_refused() -> None:
    workers = [bench.Worker(Spec("sft", "tiny", side), None, guard) for side, guard in (("polm", 2.0), ("best", 2.001))]  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="not the same work"):
        bench.check_guards("sft", "fp32", workers)
    bench.check_guards("sft", "bf16", workers)


class Counted:
    """A channel that keeps what a side sends, and stops it after two repetitions."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, **values: Any) -> None:
        self.sent.append(values)

    def wait(self) -> None:
        if len(self.sent) == 3:
            raise channel.Done


@pytest.mark.parametrize(
    ("work", "side"), [*((work, "polm") for work in polm_side.RUNS), ("midtrain", "live"), ("midtrain", "ntp")]
)
def test_each_work_runs_on_polms_side(work: str, side: str) -> None:
    sender = Counted()
    with pytest.raises(channel.Done):
        polm_side.RUNS[work](sender, Spec(work, "tiny", side, seconds=0.01))  # type: ignore[arg-type]
    ready, *results = sender.sent
    assert ready["ready"]
    assert (ready["guard"] is None) == (work == "midtrain")
    for result in results:
        assert result["seconds"] > 0
        assert result["units"] > 0
        assert result["flops"] > 0


def test_every_work_has_a_side_and_a_title() -> None:
    assert set(bench.MODELS) == set(polm_side.RUNS) == set(report.WORK)


@pytest.mark.parametrize("name", curves.CURVES)
def test_each_curve_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, *words = curves.CURVES[name]
    monkeypatch.setitem(curves.CURVES, name, (lambda vocab: build(vocab)[:3], *words))
    monkeypatch.setattr(curves.torch, "set_num_threads", lambda _: None)
    points = curves.measure(name, "tiny", 1, "fp32", repeats=1)
    assert all(point["ms"] > 0 and point["mflop"] > 0 for point in points)
    assert "(tiny)" in curves.describe(name, points)


def test_a_whole_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of SFT on the tiny model, each in its process; the file can be resumed and the page be written."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    flags = "--work sft --models tiny --sides best --repeats 2 --seconds 0.1 --threads 1 --precision fp32 --out"
    options = bench.parse([*flags.split(), str(tmp_path)])
    monkeypatch.setattr(bench, "parse", lambda: options)
    bench.main()
    data = json.loads((tmp_path / "BENCHMARKS.json").read_text())
    (row,) = data["rows"]
    assert (row["work"], row["model"], row["peer"], row["unit"]) == ("sft", "tiny", "trl", "tokens/s")
    assert row["polm_median"] > 0
    assert row["ratio"] == pytest.approx(row["polm_median"] / row["peer_median"], rel=3)
    assert 0 < row["peak_share"] < 1
    assert row["polm_peak_mb"] > 100
    page = (tmp_path / "BENCHMARKS.md").read_text()
    assert "| tiny, fp32 | trl, best found: packing=True" in page
    options.resume = True
    monkeypatch.setattr(bench, "compare", lambda *_: pytest.fail("it was there already"))
    bench.main()
    assert json.loads((tmp_path / "BENCHMARKS.json").read_text())["rows"] == [row]


def test_the_page_names_targets_and_parts() -> None:
    numbers = bench.build_numbers([2.0, 2.0], [1.0, 1.0])
    row = {
        "work": "grpo",
        "model": "10m",
        "precision": "fp32",
        "peer": "trl",
        "peer_settings": "best found: x",
        "unit": "steps/s",
        **numbers,
        "peak_share": 0.4,
        "peak_gflops": 80.0,
        "polm_peak_mb": 1.0,
        "peer_peak_mb": 2.0,
        "parts": {"generation": {"polm_seconds": 1.0, "peer_seconds": 3.0, "ratio": 3.0}},
    }
    machine = bench.describe_machine(2)
    page = report.build({"machine": machine, "rows": [row], "curves": {}})
    assert "| 4.5 |" in page
    assert "generation 1.00 against 3.00 (3.00x)" in page
    assert "no GPU" in page


def test_the_process_of_a_peer_loads_nothing_of_polm() -> None:
    """Its memory is measured."""
    code = "import sys, bench.worker, bench.peer_side; print([name for name in sys.modules if name.startswith('polm')])"
    root = Path(bench.__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "[]"
