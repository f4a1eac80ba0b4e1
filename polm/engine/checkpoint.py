"""Checkpoints inside a stage: written beside the last one, renamed into place, the older one removed after."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from polm.engine.optimizer import load_optimizer_tensors, optimizer_tensors
from polm.errors import StoreError

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Progress:
    """Where training stands: the next update, and what the metrics count on from."""

    update: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)


def _iterate_kept(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a model: what is trained, and the module's own buffers. Frozen weights come from the
    base again."""
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from model.named_buffers(recurse=False)


def save_checkpoint(workdir: Path, model: nn.Module, optimizers: Sequence[Optimizer], progress: Progress) -> None:
    """Write weights, optimizer state and progress; a kill at any moment leaves this checkpoint or the one before."""
    final = workdir / f"{PREFIX}{progress.update:08d}"
    temporary = workdir / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _iterate_kept(model)}
        save_file(weights, temporary / "weights.safetensors")
        save_file(optimizer_tensors(optimizers), temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)))
        for path in temporary.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StoreError(
            f"the checkpoint at update {progress.update} could not be written to {workdir}: {error}; "
            "free disk space and run the same command again: it goes on from the last checkpoint"
        ) from error
    for old in list_checkpoints(workdir)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(workdir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in workdir.glob(f"{PREFIX}*") if (p / "progress.json").is_file())


def restore_checkpoint(workdir: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> Progress:
    """Load the newest checkpoint into model and optimizers; a fresh `Progress` where there is none."""
    found = list_checkpoints(workdir)
    if not found:
        return Progress()
    folder = found[-1]
    try:
        weights = load_file(folder / "weights.safetensors")
        state = load_file(folder / "optimizer.safetensors")
        progress = Progress(**json.loads((folder / "progress.json").read_text()))
        with torch.no_grad():
            for name, tensor in _iterate_kept(model):
                tensor.copy_(weights[name])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the checkpoint {folder} is damaged ({error}); remove that folder and run again") from error
    load_optimizer_tensors(optimizers, state)
    return progress


def remove_checkpoints(workdir: Path) -> None:
    """Take the checkpoints away once the stage's result is written."""
    for path in [*workdir.glob(f"{PREFIX}*"), *workdir.glob(f".{PREFIX}*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)
