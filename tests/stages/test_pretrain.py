"""`polm pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polm.errors import UserError
from polm.models.loading import build_model, load_model, load_tokenizer
from polm.recipe import PretrainSettings


def test_from_random_weights(artifact: Any, check_trained: Any, check_packed: Any, read_rows: Any) -> None:
    folder = artifact("pretrain")
    check_trained(folder, None)
    check_packed(folder, 192)
    losses = [line["loss"] for line in read_rows(folder / "metrics.jsonl")]
    assert losses[0] == pytest.approx(5.16, abs=0.15)  # about log(174): nothing is known yet
    assert losses[-1] < losses[0] - 0.8


def test_the_seed_and_the_shape_make_the_model(artifact: Any, tmp_path: Path) -> None:
    """A rate of nearly 0 leaves the weights of the start, in the precision of float32."""
    settings = artifact.spec("pretrain")[1]
    optimizer = settings.optimizer.model_copy(update={"learning_rate": 1e-30, "embedding_learning_rate": 1e-30})
    still = settings.model_copy(update={"updates": 1, "optimizer": optimizer, "seed": 5})
    artifact.run("pretrain", still, artifact.inputs("pretrain"), tmp_path / "out")
    tokenizer = load_tokenizer(artifact("tokenizer") / "model")
    start = build_model(
        **settings.model.model_dump(), vocab_size=len(tokenizer), seed=5, eos_token_id=1, pad_token_id=0
    )
    weights = load_model(tmp_path / "out" / "model").state_dict()
    for name, p in start.state_dict().items():  # the row of the padding token starts from exact zeros
        torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-20)


def test_on_from_a_model(artifact: Any, check_trained: Any, tmp_path: Path) -> None:
    settings = artifact.spec("pretrain")[1].model_copy(update={"updates": 2})
    inputs = {"data": str(artifact("data")), "base": str(artifact("midtrain"))}
    artifact.run("pretrain", settings, inputs, tmp_path / "more")
    check_trained(tmp_path / "more", artifact("midtrain"))


def test_what_is_missing_is_said(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs tokenizer=FOLDER \(or base=MODEL"):
        artifact.run("pretrain", PretrainSettings(), {"data": str(artifact("data"))}, tmp_path / "x")


def test_the_first_example_is_shown(artifact: Any) -> None:
    """Every token but the first is supervised in a document."""
    text = (artifact("pretrain") / "example.txt").read_text()
    assert text.count("⟦") == text.count("⟧") == 1
    assert text.strip().endswith("<|eos|>⟧")
    assert not text.startswith("⟦")
