"""The one training loop. One iteration is one optimizer update; a stage brings a batch source and an objective.

Everything random in update u is drawn from (seed, u), so nothing but the weights, the optimizer and u has to be
saved: a killed run goes on to the same bits.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from polm.data.packing import mix_seed
from polm.engine.checkpoint import Progress, restore_checkpoint, save_checkpoint
from polm.engine.device import use_bf16
from polm.engine.optimizer import build_optimizers, set_rate
from polm.engine.schedule import compute_rate_factor
from polm.engine.score import find_slopes, score
from polm.errors import ModelError, NonFiniteError
from polm.models.actor_critic import Trained
from polm.recipe import OptimizerSettings, TrainSettings
from polm.tokens import Metric, Objective, Step, TokenBatch

CHECKPOINT_SECONDS = 600.0  # what a kill may cost where no number of updates is given
COUNT = "count/"  # metrics of this prefix are summed over the whole run, for the ledger


class BatchSource(Protocol):
    """Where batches come from. `step` must be a pure function of (update, the model's weights)."""

    @property
    def num_updates(self) -> int: ...

    @property
    def reads_weights(self) -> bool:
        """Whether `step` depends on the weights, draws from torch's generator or asks the device for a number. Where it
        does none of this, it is called while a GPU is still at the update before."""
        ...

    def step(self, update: int, model: Any) -> Step: ...

    def resumable(self, update: int) -> bool:
        """Whether a run may restart at `update` (false inside a rollout that serves several updates)."""
        ...


@dataclass(frozen=True)
class FitResult:
    num_updates: int
    tokens: int
    targets: int
    seconds: float
    counts: Mapping[str, int]
    last: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A module of the model that is trained with optimizers of its own, its gradient clipped apart; `name` is that of
    its gradient's norm in the log."""

    name: str
    module: PreTrainedModel
    settings: OptimizerSettings


Report = Callable[[Mapping[str, Any]], None]


def fit(
    model: Trained,
    source: BatchSource,
    objective: Objective,
    settings: TrainSettings,
    workdir: Path,
    *,
    temperature: float = 1.0,
    report: Report | None = None,
    parts: Sequence[Part] = (),
) -> FitResult:
    """Train `model` in place and write `metrics.jsonl` into `workdir`; goes on from a checkpoint found there.

    `parts` are what the model consists of (default: it is one, with the optimizer of the settings). `report` receives
    each logged line (see `_line` for its keys). Raises NonFiniteError, with the batch saved, when the loss or the
    gradient is not finite, and StoreError when a checkpoint cannot be written.
    """
    device = model.device.type
    bf16 = use_bf16(settings.precision, device)
    parts = parts or [Part("", model, settings.optimizer)]
    optimizers = [optimizer for part in parts for optimizer in build_optimizers(part.module, part.settings, bf16=bf16)]
    progress = restore_checkpoint(workdir, model, optimizers)
    log = MetricsLog(workdir / "metrics.jsonl", progress.update)
    model.train()
    for part in parts:
        set_activation_checkpointing(part.module, settings.activation_checkpointing)
    line: dict[str, Any] = {}
    ahead: Step | None = None
    began = time.perf_counter() - (saved := progress.seconds)
    for update in range(progress.update, source.num_updates):
        torch.manual_seed(mix_seed(settings.seed, update))  # dropout, where a model has it
        rate = set_rate(optimizers, compute_rate_factor(update, source.num_updates, settings.schedule))
        step = source.step(update, model) if ahead is None else ahead
        sums = add_up(model, step.batches, objective, temperature, bf16)
        ahead = _look_ahead(source, update + 1, model)
        loss, measured = sums.read()
        metrics, counts = split_counts({**measured, **step.metrics}, progress.counts)
        norm, metrics = _clip_parts(parts, metrics)
        _require_finite(loss, norm, step.batches, update, workdir)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress = replace(
            progress,
            update=update + 1,
            tokens=progress.tokens + sum(batch.num_tokens for batch in step.batches),
            targets=progress.targets + sum(batch.num_targets for batch in step.batches),
            seconds=time.perf_counter() - began,
            counts=counts,
        )
        last = progress.update == source.num_updates
        if last or progress.update % settings.log_every == 0:
            line = _line(progress, source.num_updates, rate, loss, norm, metrics)
            log.write(line)
            if report is not None:
                report(line)
        if not last and _is_due(settings.checkpoint_every, progress, saved) and source.resumable(progress.update):
            save_checkpoint(workdir, model, optimizers, progress)
            saved = progress.seconds
    return FitResult(source.num_updates, progress.tokens, progress.targets, progress.seconds, progress.counts, line)


def _is_due(every: int | None, progress: Progress, saved: float) -> bool:
    """Whether it is time for a checkpoint; the one before was made at `saved` seconds of the run."""
    if every is None:
        return progress.seconds - saved >= CHECKPOINT_SECONDS
    return every > 0 and progress.update % every == 0


def _look_ahead(source: BatchSource, update: int, model: Trained) -> Step | None:
    """The batches of `update` if they can be had now: a GPU computes until the host asks it for the loss.

    None where they cannot be made: they are asked for again in their own update, which the error then stops.
    """
    if update >= source.num_updates or source.reads_weights:
        return None
    try:
        return source.step(update, model)
    except Exception:  # noqa: BLE001 (a batch must not cost the update before it)
        return None


def set_activation_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Keep only the inputs of each layer for the backward pass, or all that it needs. Raises ModelError where the
    architecture cannot."""
    if not enabled:
        if model.is_gradient_checkpointing:
            model.gradient_checkpointing_disable()
        return
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"activation_checkpointing: {model.config.model_type} does not support it in transformers; set it to false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})


def split_counts(measured: Mapping[str, Any], before: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """Take the names under `count/` out of an update's metrics and add them to the counts of the whole run."""
    metrics = {name: value for name, value in measured.items() if not name.startswith(COUNT)}
    counts = dict(before)
    for name in measured.keys() - metrics.keys():
        short = name.removeprefix(COUNT)
        counts[short] = counts.get(short, 0) + round(measured[name])
    return metrics, counts


@dataclass(frozen=True)
class Sums:
    """What the micro-batches of an update add up to, float64 on the model's device."""

    total: Tensor
    denominator: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]  # name -> (total, count)

    def read(self) -> tuple[float, dict[str, Any]]:
        """The loss and the averaged metrics; waits for the device."""
        parts = [self.total, self.denominator, *(part for pair in self.metrics.values() for part in pair)]
        flat = torch.cat([part.reshape(-1).to(self.total.device) for part in parts]).cpu()  # one copy, one wait
        numbers = torch.split(flat, [part.numel() for part in parts])
        total, denominator, *rest = (own.view(part.shape) for own, part in zip(numbers, parts, strict=True))
        metrics = {}
        for name, top, bottom in zip(self.metrics, rest[::2], rest[1::2], strict=True):
            metrics[name] = (top if name.startswith(COUNT) else top / bottom.clamp(min=1e-12)).tolist()
        return float(total / denominator.clamp(min=1e-12)), metrics


def accumulate(
    model: Trained, batches: Sequence[TokenBatch], objective: Objective, temperature: float, bf16: bool
) -> tuple[float, dict[str, Any]]:
    """`add_up`, and its loss and averaged metrics."""
    return add_up(model, batches, objective, temperature, bf16).read()


def add_up(model: Trained, batches: Sequence[TokenBatch], objective: Objective, temperature: float, bf16: bool) -> Sums:
    """Gradients of sum(totals) / sum(denominators) over the micro-batches of one update, left in `.grad`.

    Sums are local and the division is global, so the split into micro-batches does not change the result. Nothing here
    waits for a GPU; an objective may (those of mid-training do not).
    """
    total = denominator = torch.zeros((), dtype=torch.float64, device=model.device)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        on_device = batch.to(model.device)
        slopes_NK = find_slopes(objective, on_device)
        scores = score(model, on_device, objective.needs, temperature=temperature, bf16=bf16, slopes_NK=slopes_NK)
        out = objective.compute(scores, on_device)
        out.total.backward()  # type: ignore[no-untyped-call]
        total = total + out.total.detach().double()
        denominator = denominator + out.denominator.detach().double()
        for name, metric in out.metrics.items():
            sums[name] = _add(sums.get(name), metric)
    # Without a target there is no gradient to divide.
    inverse = torch.where(denominator > 0, 1.0 / denominator, 1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(inverse)
    return Sums(total, denominator, sums)


def _add(before: tuple[Tensor, Tensor] | None, metric: Metric) -> tuple[Tensor, Tensor]:
    total = metric.total.detach().double()
    count = metric.count
    # A fill, where a copy of a number would wait for the device.
    count = count.detach().double() if isinstance(count, Tensor) else total.new_full((), float(count))
    return (total, count) if before is None else (before[0] + total, before[1] + count)


def _clip_parts(parts: Sequence[Part], metrics: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Clip each part's gradient. Returns the first norm that is not finite, or else the first part's; and the metrics
    with those of the other parts."""
    norms = [_clip(part.module, part.settings.clip_norm) for part in parts]
    more = {f"grad_norm/{part.name}": norm for part, norm in zip(parts[1:], norms[1:], strict=True)}
    bad = [norm for norm in norms if not math.isfinite(norm)]
    return bad[0] if bad else norms[0], {**metrics, **more}


def _clip(model: PreTrainedModel, clip_norm: float) -> float:
    """The gradient's norm before clipping; gradients longer than `clip_norm` (if not 0) are scaled down to it."""
    limit = clip_norm if clip_norm > 0 else float("inf")
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))


def _require_finite(loss: float, norm: float, batches: Sequence[TokenBatch], update: int, workdir: Path) -> None:
    """Stop before a bad update reaches the weights, and keep the batch for a post-mortem."""
    if torch.isfinite(torch.tensor([loss, norm])).all():
        return
    file = workdir / f"nonfinite-update-{update}.safetensors"
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        own = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        for name, value in {**own, **{f"streams.{k}": v for k, v in batch.streams.items()}}.items():
            tensors[f"{number}.{name}"] = value.cpu().contiguous()
    save_file(tensors, file)
    raise NonFiniteError(
        f"update {update}: the loss is {loss} and the gradient norm {norm}; the weights were not changed. "
        f"The batch is in {file}. Lower the learning rate, use precision: fp32, or look for extreme inputs"
    )


def _line(
    progress: Any, num_updates: int, rate: float, loss: float, norm: float, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    speed = progress.tokens / max(progress.seconds, 1e-9)
    left = progress.seconds / progress.update * (num_updates - progress.update)
    return {
        "update": progress.update,
        "num_updates": num_updates,
        "tokens": progress.tokens,
        "targets": progress.targets,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(speed, 1),
        "eta_seconds": round(left, 1),
        "lr": rate,
        "loss": loss,
        "grad_norm": norm,
        **metrics,
    }


class MetricsLog:
    """Append-only `metrics.jsonl`; lines past the checkpoint that a run goes on from are taken out first."""

    def __init__(self, path: Path, update: int):
        kept = []
        if path.exists():
            for raw in path.read_text().splitlines():
                try:
                    row = json.loads(raw)
                except json.JSONDecodeError:
                    break  # the line that a kill cut short; everything after it is repeated
                if row["update"] <= update:
                    kept.append(raw)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # a kill in between must not lose the lines that are kept
        temporary.write_text("".join(raw + "\n" for raw in kept))
        temporary.replace(path)
        self._handle = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._handle.write(json.dumps(line) + "\n")
        self._handle.flush()
