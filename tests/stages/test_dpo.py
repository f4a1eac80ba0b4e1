"""`polm dpo`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polm.errors import ModelError, UserError
from polm.models.loading import load_model
from polm.recipe import AnnotateSettings, DPOSettings


def test_a_turn(artifact: Any, check_trained: Any, check_packed: Any, read_rows: Any, read_manifest: Any) -> None:
    folder = artifact("dpo")
    check_trained(folder, artifact("sft"))
    check_packed(folder, 192)
    first, last = (read_rows(folder / "metrics.jsonl")[i] for i in (0, -1))
    # The reference is the base itself: at first no pair has a margin, and the loss is log 2.
    assert first["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert first["dpo/margin"] == pytest.approx(0.0, abs=1e-4)
    assert last["loss"] < first["loss"]
    assert last["dpo/accuracy"] > 0.5
    ledger = read_manifest(folder)["ledger"]
    assert ledger["read"] == read_manifest(artifact("pairs"))["summary"]["pairs"]


def test_both_answers_are_marked(artifact: Any) -> None:
    text = (artifact("dpo") / "example.txt").read_text()
    assert text.count("⟦") == 2
    assert text.count("<|eos|>⟧") >= 1  # an answer that was cut off at its length has no end token of its own


def test_a_reference_as_scores_or_as_a_model_is_the_same(artifact: Any, tmp_path: Path) -> None:
    """And other than the default, in which the base is the reference."""
    inputs = artifact.inputs("dpo")
    settings = artifact.spec("dpo")[1]
    reference = {"model": str(artifact("midtrain")), "data": inputs["data"]}
    annotate = AnnotateSettings(data="preferences", max_tokens=192, precision="fp32")
    artifact.run("annotate", annotate, reference, tmp_path / "scores")
    artifact.run("dpo", settings, {**inputs, "reference": str(tmp_path / "scores")}, tmp_path / "by-scores")
    artifact.run("dpo", settings, {**inputs, "reference": str(artifact("midtrain"))}, tmp_path / "by-model")
    weights = [load_model(folder / "model").state_dict() for folder in (tmp_path / "by-scores", tmp_path / "by-model")]
    for name, p in weights[0].items():
        torch.testing.assert_close(p, weights[1][name], rtol=1e-3, atol=1e-4)
    own = load_model(artifact("dpo") / "model").state_dict()
    assert max(float((p - own[name]).abs().max()) for name, p in weights[0].items()) > 1e-3


def test_a_reference_with_another_tokenizer(artifact: Any, other_model: Path, tmp_path: Path) -> None:
    inputs = {**artifact.inputs("dpo"), "reference": str(other_model)}
    with pytest.raises(ModelError, match="do not have the same tokenizer"):
        artifact.run("dpo", artifact.spec("dpo")[1], inputs, tmp_path / "out")


def test_scores_of_other_data(artifact: Any, tmp_path: Path) -> None:
    inputs = {**artifact.inputs("dpo"), "reference": str(artifact("annotate"))}
    with pytest.raises(UserError, match=r"were made with another data .*run `polm annotate`"):
        artifact.run("dpo", DPOSettings(bin_tokens=192), inputs, tmp_path / "out")
