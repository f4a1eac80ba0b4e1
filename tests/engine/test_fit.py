"""The one loop: it stops and goes on to the same bits, keeps one line an update, and never trains on nonsense."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from polm.apps.show import describe_line
from polm.data.packing import PackedTrees, pack_trees
from polm.engine import fit as loop
from polm.engine.checkpoint import list_checkpoints
from polm.engine.fit import FitResult, MetricsLog, fit
from polm.engine.score import score
from polm.errors import DataError, ModelError, NonFiniteError, StoreError
from polm.models.loading import prepare_model
from polm.objectives.ntp import build_ntp
from polm.objectives.remit import build_remit
from polm.recipe import OptimizerSettings, PackedSettings, ScheduleSettings
from polm.tokens import Loss, Metric, Objective, Scores, Step, TokenBatch, build_document

Build = Callable[..., PreTrainedModel]
OPTIMIZERS = {
    "adamw": OptimizerSettings(learning_rate=0.003, weight_decay=0.1),
    "muon": OptimizerSettings(kind="muon", learning_rate=0.01),
}


class Stopped(Exception):
    """Stands in for a kill between two updates."""


def build_settings(**changes: Any) -> PackedSettings:
    values = {
        "seed": 3,
        "updates": 8,
        "bin_tokens": 32,
        "bins_per_update": 2,
        "micro_bins": 1,
        "precision": "fp32",
        "schedule": ScheduleSettings(kind="linear", warmup_updates=1),
    }
    return PackedSettings(**{**values, **changes})


def build_source(settings: PackedSettings, num_docs: int = 24) -> PackedTrees:
    rng = np.random.default_rng(0)
    trees = [
        build_document(ids, {"ref_logprobs": rng.uniform(-6.0, -0.1, len(ids)).astype(np.float32)})
        for ids in (rng.integers(2, 40, rng.integers(4, 20)) for _ in range(num_docs))
    ]
    return pack_trees(
        trees,
        bin_tokens=settings.bin_tokens,
        bins_per_update=settings.bins_per_update,
        micro_bins=settings.micro_bins,
        updates=settings.updates,
        epochs=settings.epochs,
        seed=settings.seed,
    )


class _Watched:
    """A source that notes when it is asked, among what else happens."""

    def __init__(self, inner: PackedTrees, reads_weights: bool, events: list[str]):
        self.inner, self.reads_weights, self.events = inner, reads_weights, events
        self.num_updates = inner.num_updates

    def resumable(self, update: int) -> bool:
        return self.inner.resumable(update)

    def step(self, update: int, model: PreTrainedModel) -> Step:
        self.events.append(f"batch {update}")
        return self.inner.step(update, model)


@pytest.mark.parametrize("reads_weights", [False, True])
def test_batches_are_made_before_the_loss_is_waited_for(
    build_tiny: Build, reads_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that do not depend on the weights; each once, and the numbers are the same either way."""
    settings, events = build_settings(updates=3), []
    read = loop.Sums.read

    def note_read(sums: loop.Sums) -> tuple[float, dict[str, Any]]:
        events.append("loss")
        return read(sums)

    monkeypatch.setattr(loop.Sums, "read", note_read)
    source = _Watched(build_source(settings), reads_weights, events)
    found = fit(build_tiny(), source, build_ntp(), settings, tmp_path / "watched").last["loss"]
    early = ["batch 0", "batch 1", "loss", "batch 2", "loss", "loss"]
    assert events == (["batch 0", "loss", "batch 1", "loss", "batch 2", "loss"] if reads_weights else early)
    assert found == fit(build_tiny(), build_source(settings), build_ntp(), settings, tmp_path / "plain").last["loss"]


def test_a_batch_that_cannot_be_made_costs_its_own_update_only(build_tiny: Build, tmp_path: Path) -> None:
    class Broken(_Watched):
        def step(self, update: int, model: PreTrainedModel) -> Step:
            if update == 2:
                raise DataError("line 7 of a file is broken")
            return super().step(update, model)

    settings = build_settings(updates=4)
    with pytest.raises(DataError, match="line 7"):
        fit(build_tiny(), Broken(build_source(settings), False, []), build_ntp(), settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2]


def train(build_tiny: Build, workdir: Path, settings: PackedSettings, stop_after: int = 0) -> dict[str, torch.Tensor]:
    """Weights after `fit` from the same start; with `stop_after` it is cut off after that many updates of this call."""
    model = build_tiny()
    lines: list[Mapping[str, Any]] = []

    def report(line: Mapping[str, Any]) -> None:
        lines.append(line)
        if len(lines) == stop_after:
            raise Stopped

    fit(model, build_source(settings), build_ntp(), settings, workdir, report=report)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_clock(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "eta_seconds")}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_stopped_run_goes_on_to_the_same_bits(build_tiny: Build, tmp_path: Path, kind: str) -> None:
    settings = build_settings(optimizer=OPTIMIZERS[kind], checkpoint_every=3)
    whole = train(build_tiny, tmp_path / "whole", settings)
    workdir = tmp_path / "parts"
    for stop_after, resumes_at in ((2, None), (5, 3), (2, 3), (4, 6)):
        with pytest.raises(Stopped):
            train(build_tiny, workdir, settings, stop_after)
        found = [int(p.name[-8:]) for p in list_checkpoints(workdir)]
        assert found == ([resumes_at] if resumes_at else []), stop_after
    parts = train(build_tiny, workdir, settings)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    start = {name: p.detach() for name, p in build_tiny().named_parameters()}
    assert not any(torch.equal(parts[name], start[name]) for name in whole)

    lines = read_lines(workdir)
    assert [line["update"] for line in lines] == list(range(1, 9))
    expected = read_lines(tmp_path / "whole")
    assert [without_clock(line) for line in lines] == [without_clock(line) for line in expected]
    assert all(b["seconds"] >= a["seconds"] for a, b in itertools.pairwise(lines))


def test_dropout_is_drawn_anew_from_seed_and_update(tmp_path: Path) -> None:
    """What is random in an update depends on nothing before it, so a stop changes nothing."""
    settings = build_settings(checkpoint_every=3)

    def run(workdir: Path, stop_after: int, seed: int = 3) -> list[float]:
        config = AutoConfig.for_model(
            "gpt2", vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=1
        )
        torch.manual_seed(0)
        model = prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), "gpt2")
        losses: list[float] = []

        def report(line: Mapping[str, Any]) -> None:
            losses.append(line["loss"])
            if len(losses) == stop_after:
                raise Stopped

        own = settings.model_copy(update={"seed": seed})
        fit(model, build_source(settings), build_ntp(), own, workdir, report=report)
        return losses

    whole = run(tmp_path / "whole", 0)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", 5)
    assert run(tmp_path / "parts", 0) == whole[3:]
    assert run(tmp_path / "other", 0, seed=4)[0] != whole[0]  # the same batch, other dropout


def test_without_a_number_it_is_saved_by_the_clock(
    build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One checkpoint as soon as the last is old enough, counted from the last and over a restart; the bits stay."""
    settings = build_settings()
    assert settings.checkpoint_every is None
    whole = train(build_tiny, tmp_path / "whole", settings)  # far from ten minutes: no checkpoint
    clock = itertools.count(step=4.0)  # read once as the loop begins and once an update
    monkeypatch.setattr("polm.engine.fit.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("polm.engine.fit.CHECKPOINT_SECONDS", 10.0)
    with pytest.raises(Stopped):
        train(build_tiny, tmp_path / "parts", settings, stop_after=6)
    assert [p.name[-8:] for p in list_checkpoints(tmp_path / "parts")] == ["00000003"]
    with pytest.raises(Stopped):
        train(build_tiny, tmp_path / "parts", settings, stop_after=4)  # updates 4 to 7; the next is due after 6
    assert [p.name[-8:] for p in list_checkpoints(tmp_path / "parts")] == ["00000006"]
    parts = train(build_tiny, tmp_path / "parts", settings)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_without_checkpoints_it_starts_again(build_tiny: Build, tmp_path: Path) -> None:
    settings = build_settings(checkpoint_every=0)
    with pytest.raises(Stopped):
        train(build_tiny, tmp_path, settings, stop_after=5)
    assert list_checkpoints(tmp_path) == []
    train(build_tiny, tmp_path, settings)
    assert [line["update"] for line in read_lines(tmp_path)] == list(range(1, 9))


def test_no_restart_inside_a_rollout(build_tiny: Build, tmp_path: Path) -> None:
    """A source that serves several updates from one rollout is checkpointed between rollouts only."""

    class Rollouts:
        num_updates = 8
        reads_weights = True

        def __init__(self, inner: PackedTrees):
            self.inner = inner

        def resumable(self, update: int) -> bool:
            return update % 4 == 0

        def step(self, update: int, model: PreTrainedModel) -> Step:
            return self.inner.step(update, model)

    settings = build_settings(checkpoint_every=1)
    seen: list[list[int]] = []

    def report(line: Mapping[str, Any]) -> None:
        del line
        seen.append([int(p.name[-8:]) for p in list_checkpoints(tmp_path)])

    fit(build_tiny(), Rollouts(build_source(settings)), build_ntp(), settings, tmp_path, report=report)
    assert seen == [[], [], [], [], [4], [4], [4], [4]]  # the report of update u comes before its checkpoint


def test_metrics_lines(build_tiny: Build, tmp_path: Path) -> None:
    settings = build_settings(log_every=3, optimizer=OPTIMIZERS["muon"])
    source = build_source(settings)
    result: FitResult = fit(build_tiny(), source, build_ntp(), settings, tmp_path)
    lines = read_lines(tmp_path)
    assert [line["update"] for line in lines] == [3, 6, 8]  # every third, and the last
    for line in lines:
        batches = [b for u in range(line["update"]) for b in source.step(u).batches]
        assert line["num_updates"] == 8
        assert line["tokens"] == sum(b.num_tokens for b in batches)
        assert line["targets"] == sum(b.num_targets for b in batches)
        assert line["tokens_per_second"] > 0
        left = line["seconds"] / line["update"] * (8 - line["update"])
        assert line["eta_seconds"] == pytest.approx(left, abs=0.11)
        assert line["grad_norm"] > 0
        assert line["loss"] == pytest.approx(line["ntp/nll"], rel=1e-6)
    # Warm-up over one update, linear over the other seven: updates 3 and 8 are number 2 and 7.
    assert lines[0]["lr"] == pytest.approx(0.01 * (1 - 1 / 7))
    assert lines[2]["lr"] == pytest.approx(0.01 * (1 - 6 / 7))
    assert (result.num_updates, result.tokens, result.targets) == (8, lines[2]["tokens"], lines[2]["targets"])
    assert result.last == lines[2]


def test_counts_are_summed_over_the_whole_run(build_tiny: Build, tmp_path: Path) -> None:
    """Metrics under count/ are sums for the ledger, also of the updates before a stop; no line has them."""

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        metrics = {"count/targets": Metric(torch.tensor(float(batch.num_targets)), 1.0)}
        return Loss(-scores.logprobs_N.sum(), torch.tensor(float(batch.num_targets)), metrics)

    settings = build_settings(checkpoint_every=3)

    def run(stop_after: int) -> FitResult:
        lines: list[Mapping[str, Any]] = []

        def report(line: Mapping[str, Any]) -> None:
            lines.append(line)
            if len(lines) == stop_after:
                raise Stopped

        return fit(build_tiny(), build_source(settings), Objective("x", compute), settings, tmp_path, report=report)

    with pytest.raises(Stopped):
        run(5)
    result = run(0)
    assert result.counts == {"targets": result.targets}
    assert not any(name.startswith("count/") for line in read_lines(tmp_path) for name in line)


def test_a_progress_line_tells_the_rate_and_the_time_left(build_tiny: Build, tmp_path: Path) -> None:
    shown: list[str] = []
    settings = build_settings(updates=2)
    fit(
        build_tiny(),
        build_source(settings),
        build_ntp(),
        settings,
        tmp_path,
        report=lambda x: shown.append(describe_line(x)),
    )
    assert len(shown) == 2
    for text in shown:
        assert "loss" in text
        assert "tok/s" in text
        assert "s left" in text
    line = {"loss": 1.23456, "tokens_per_second": 5321.7, "eta_seconds": 61.2, "update": 1, "num_updates": 2}
    assert describe_line(line) == "loss 1.235, 5,322 tok/s, 61 s left"


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1, "loss": 3.0}\n{"update": 2, "loss": 2.0}\n{"update": 3, "lo')
    log = MetricsLog(path, 2)
    log.write({"update": 3, "loss": 1.0})
    assert read_lines(tmp_path) == [{"update": u, "loss": 4.0 - u} for u in (1, 2, 3)]


def test_lines_past_the_checkpoint_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"update": u}) + "\n" for u in range(1, 8)))
    MetricsLog(path, 4)
    assert [line["update"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]
    MetricsLog(path, 0)
    assert read_lines(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kill_while_the_log_is_repaired_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines up to the checkpoint are made by nobody again: the file must be replaced, not emptied and refilled."""
    path = tmp_path / "metrics.jsonl"
    before = "".join(json.dumps({"update": u}) + "\n" for u in range(1, 8))
    path.write_text(before)
    real = Path.write_text

    def torn(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        real(self, text[:5], *args, **kwargs)
        raise Stopped

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(Stopped):
        MetricsLog(path, 4)
    assert path.read_text() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights(build_tiny: Build, tmp_path: Path, value: float) -> None:
    calls: list[int] = []

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        calls.append(batch.num_targets)
        factor = value if len(calls) > 4 else 1.0  # the fifth micro-batch: update 2
        return Loss(-scores.logprobs_N.sum() * factor, torch.tensor(float(batch.num_targets)))

    settings = build_settings()
    source = build_source(settings)
    model = build_tiny()
    states: list[dict[str, torch.Tensor]] = []

    def report(line: Mapping[str, Any]) -> None:
        del line
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})

    with pytest.raises(NonFiniteError, match=r"update 2.*weights were not changed.*learning rate"):
        fit(model, source, Objective("bad", compute), settings, tmp_path, report=report)
    assert len(states) == 2
    assert all(torch.equal(p.detach(), states[1][name]) for name, p in model.named_parameters())
    saved = load_file(tmp_path / "nonfinite-update-2.safetensors")
    for number, batch in enumerate(source.step(2).batches):
        assert torch.equal(saved[f"{number}.tokens_T"], batch.tokens_T)
        assert torch.equal(saved[f"{number}.streams.ref_logprobs"], batch.streams["ref_logprobs"])
    assert len(read_lines(tmp_path)) == 2


def test_a_gradient_that_is_not_finite_stops_too(build_tiny: Build, tmp_path: Path) -> None:
    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        del batch
        # sqrt(x - x) is 0 with an infinite slope.
        zero = (scores.logprobs_N - scores.logprobs_N.detach()).sum()
        return Loss(zero.abs().sqrt(), torch.tensor(1.0))

    settings = build_settings()
    with pytest.raises(NonFiniteError, match="gradient norm"):
        fit(build_tiny(), build_source(settings), Objective("bad", compute), settings, tmp_path)


def test_a_weight_that_is_no_number_stops_a_linear_objective(build_tiny: Build, tmp_path: Path) -> None:
    """There the head's gradient is computed before the loss is known."""
    settings = build_settings()
    source = build_source(settings)

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        total = (batch.at_targets("ref_logprobs") * scores.logprobs_N).sum()
        return Loss(total, torch.tensor(1.0))

    class Damaged:
        num_updates, reads_weights = 1, True

        def step(self, update: int, model: Any) -> Step:
            del model
            nan = torch.full_like(source.step(update).batches[0].streams["ref_logprobs"], float("nan"))
            return Step([source.step(update).batches[0].with_streams(ref_logprobs=nan)])

        def resumable(self, update: int) -> bool:
            return update >= 0

    with pytest.raises(NonFiniteError, match="the loss is nan"):
        fit(build_tiny(), Damaged(), Objective("damaged", compute, linear=True), settings, tmp_path)
    assert (tmp_path / "nonfinite-update-0.safetensors").is_file()


def test_a_full_disk_at_a_checkpoint_can_be_cured(
    build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = build_settings(checkpoint_every=3)
    whole = train(build_tiny, tmp_path / "whole", settings)
    workdir = tmp_path / "parts"
    real = loop.save_checkpoint

    def full(workdir: Path, model: PreTrainedModel, optimizers: Any, progress: Any) -> None:
        if progress.update == 6:
            raise StoreError("no space")
        real(workdir, model, optimizers, progress)

    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(StoreError):
        train(build_tiny, workdir, settings)
    assert [p.name for p in list_checkpoints(workdir)] == ["checkpoint-00000003"]
    monkeypatch.undo()
    parts = train(build_tiny, workdir, settings)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_gradients_are_clipped_to_the_norm(build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def spy(loss: float, norm: float, batches: Any, update: int, workdir: Path) -> None:
        del loss, batches, update, workdir
        grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        norms.extend([norm, float(torch.stack(grads).norm())])

    monkeypatch.setattr(loop, "_require_finite", spy)
    for clip_norm, factor in ((0.25, None), (0.0, 1.0)):
        norms.clear()
        model = build_tiny()
        settings = build_settings(updates=1, optimizer=OptimizerSettings(clip_norm=clip_norm))
        fit(model, build_source(settings), build_ntp(), settings, tmp_path / str(clip_norm))
        before, after = norms
        assert before > 0.5
        assert after == pytest.approx(before if factor else clip_norm, rel=1e-4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_remit_without_eps_is_next_token_prediction_to_the_bit(build_tiny: Build, tmp_path: Path, kind: str) -> None:
    settings = build_settings(optimizer=OPTIMIZERS[kind])
    results = {}
    for name, eps in (("ntp", None), ("remit", 0.0), ("weighted", 0.8)):
        objective = build_ntp()
        if eps is not None:
            objective = build_remit(
                eps=eps, temperature=1.0, centring="sequence", base="live", denominator="tokens", shuffled=False
            )
        model = build_tiny()
        fit(model, build_source(settings), objective, settings, tmp_path / name)
        results[name] = {key: p.detach().clone() for key, p in model.named_parameters()}
    assert all(torch.equal(results["ntp"][key], results["remit"][key]) for key in results["ntp"])
    assert not any(torch.equal(results["ntp"][key], results["weighted"][key]) for key in results["ntp"])
    losses = [[line["loss"] for line in read_lines(tmp_path / name)] for name in ("ntp", "remit")]
    assert losses[0] == losses[1]


def test_activation_checkpointing_changes_memory_and_nothing_else(build_tiny: Build, tmp_path: Path) -> None:
    """The same bits; and fewer numbers are held between the forward and the backward pass."""
    held: dict[bool, int] = {}
    results = {}
    for enabled in (False, True):
        settings = build_settings(activation_checkpointing=enabled, updates=3)
        results[enabled] = train(build_tiny, tmp_path / str(enabled), settings)
        model = build_tiny()
        loop.set_activation_checkpointing(model, enabled)
        batch = build_source(settings).step(0).batches[0]
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            score(model, batch)
        held[enabled] = sum(sizes)
    assert all(torch.equal(results[True][name], results[False][name]) for name in results[True])
    assert held[True] < held[False] / 2


def test_activation_checkpointing_is_refused_where_there_is_none(build_tiny: Build) -> None:
    model = build_tiny()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match=r"qwen3 does not support it.*false"):
        loop.set_activation_checkpointing(model, True)
