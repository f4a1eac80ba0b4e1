"""Checkpoints: exact round trips, a kill or a full disk at any moment, and damage that is named."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from polm.engine import checkpoint
from polm.engine.checkpoint import (
    Progress,
    list_checkpoints,
    remove_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from polm.engine.optimizer import build_optimizers, optimizer_tensors
from polm.errors import StoreError
from polm.recipe import OptimizerSettings

KINDS = [OptimizerSettings(kind="muon"), OptimizerSettings(kind="adamw", weight_decay=0.1)]
PROGRESS = Progress(update=7, tokens=70, targets=63, seconds=1.25)


def take_steps(model: PreTrainedModel, optimizers: list[Optimizer], seed: int, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.kind)
@pytest.mark.parametrize("tie", [True, False])
def test_round_trip(
    build_tiny: Callable[..., PreTrainedModel], tmp_path: Path, settings: OptimizerSettings, tie: bool
) -> None:
    model = build_tiny(tie_embeddings=tie)
    optimizers = build_optimizers(model, settings)
    take_steps(model, optimizers, seed=0)
    save_checkpoint(tmp_path, model, optimizers, PROGRESS)

    other = build_tiny(seed=1, tie_embeddings=tie)
    other_optimizers = build_optimizers(other, settings)
    take_steps(other, other_optimizers, seed=1, steps=1)
    assert restore_checkpoint(tmp_path, other, other_optimizers) == PROGRESS
    assert_equal(weights_of(other), weights_of(model))
    assert_equal(optimizer_tensors(other_optimizers), optimizer_tensors(optimizers))
    # And both go on to the same bits.
    take_steps(model, optimizers, seed=2)
    take_steps(other, other_optimizers, seed=2)
    assert_equal(weights_of(other), weights_of(model))


def test_nothing_there_is_a_fresh_start(build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = build_tiny()
    before = weights_of(model)
    assert restore_checkpoint(tmp_path, model, build_optimizers(model, KINDS[0])) == Progress()
    assert_equal(weights_of(model), before)


def test_only_the_newest_is_kept(build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = build_tiny()
    optimizers = build_optimizers(model, KINDS[0])
    for update in (9, 10, 100):
        save_checkpoint(tmp_path, model, optimizers, Progress(update=update))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000100"]
    assert restore_checkpoint(tmp_path, model, optimizers).update == 100
    (tmp_path / ".checkpoint-00000101.tmp").mkdir()
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [1, 2], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_old_checkpoint(
    build_tiny: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    model = build_tiny()
    optimizers = build_optimizers(model, KINDS[0])
    take_steps(model, optimizers, seed=0)
    save_checkpoint(tmp_path, model, optimizers, PROGRESS)
    saved = weights_of(model)
    take_steps(model, optimizers, seed=1)
    real, calls = checkpoint.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == number:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, *rest)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StoreError, match=r"update 8 could not be written.*free disk space"):
        save_checkpoint(tmp_path, model, optimizers, Progress(update=8))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000007"]
    assert restore_checkpoint(tmp_path, model, optimizers) == PROGRESS
    assert_equal(weights_of(model), saved)


def test_an_unfinished_folder_does_not_count(build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """What a kill leaves: a temporary folder, or a renamed folder of which the disk lost the last file."""
    model = build_tiny()
    optimizers = build_optimizers(model, KINDS[0])
    take_steps(model, optimizers, seed=0)
    save_checkpoint(tmp_path, model, optimizers, PROGRESS)
    (tmp_path / ".checkpoint-00000008.tmp").mkdir()
    (tmp_path / ".checkpoint-00000008.tmp" / "progress.json").write_text("{}")
    (tmp_path / "checkpoint-00000009").mkdir()
    assert restore_checkpoint(tmp_path, model, optimizers) == PROGRESS
    save_checkpoint(tmp_path, model, optimizers, Progress(update=8))  # over the leftovers
    assert restore_checkpoint(tmp_path, model, optimizers).update == 8


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_named(build_tiny: Callable[..., PreTrainedModel], tmp_path: Path, name: str) -> None:
    model = build_tiny()
    optimizers = build_optimizers(model, KINDS[0])
    take_steps(model, optimizers, seed=0)
    save_checkpoint(tmp_path, model, optimizers, PROGRESS)
    file = tmp_path / "checkpoint-00000007" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"checkpoint-00000007 is damaged.*remove that folder"):
        restore_checkpoint(tmp_path, model, optimizers)


def test_a_checkpoint_of_another_optimizer_is_refused(
    build_tiny: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = build_tiny()
    save_checkpoint(tmp_path, model, build_optimizers(model, KINDS[0]), PROGRESS)
    other = build_tiny(num_layers=3)
    with pytest.raises(StoreError, match="damaged"):
        restore_checkpoint(tmp_path, other, build_optimizers(other, KINDS[0]))
