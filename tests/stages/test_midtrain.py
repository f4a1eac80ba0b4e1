"""`polm midtrain`: what the weightings share and in what they differ."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from polm.errors import UserError
from polm.models.loading import load_model
from polm.recipe import MidtrainSettings
from polm.stages.midtrain import build_objective

WEIGHTINGS = ("midtrain", "remit", "shuffled", "rho1", "distill", "plausible")
METRICS = {
    "midtrain": {"ntp/nll"},
    "remit": {"remit/clip_fraction", "remit/weight_histogram", "remit/mean_abs_delta", "remit/mean_weight"},
    "shuffled": {"remit/clip_fraction", "remit/weight_histogram", "remit/mean_abs_delta", "remit/mean_weight"},
    "rho1": {"rho1/kept_fraction", "rho1/kept_excess", "rho1/mean_excess"},
    "distill": {"distill/kl", "distill/covered"},
    "plausible": {"plausible/mean_weight", "plausible/dropped"},
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_turn(artifact: Any, check_trained: Any, check_packed: Any, read_rows: Any, name: str) -> None:
    folder = artifact(name)
    check_trained(folder, artifact("pretrain"))
    check_packed(folder, 192)
    lines = read_rows(folder / "metrics.jsonl")
    assert all(METRICS[name] | {"ntp/nll"} <= line.keys() for line in lines)


def test_arms_see_the_same_tokens_in_the_same_order(artifact: Any, read_rows: Any) -> None:
    """At the first update all arms are the same model on the same batch: the plain loss is equal to the bit."""
    runs = {name: read_rows(artifact(name) / "metrics.jsonl") for name in WEIGHTINGS}
    for name in WEIGHTINGS[1:]:
        assert [(x["tokens"], x["targets"]) for x in runs[name]] == [
            (x["tokens"], x["targets"]) for x in runs["midtrain"]
        ]
        assert runs[name][0]["ntp/nll"] == pytest.approx(runs["midtrain"][0]["ntp/nll"], rel=1e-6)
        assert runs[name][0]["loss"] != runs["midtrain"][0]["loss"]
        assert runs[name][0]["lr"] == runs["midtrain"][0]["lr"]


def test_arms_end_in_other_weights(artifact: Any) -> None:
    states = {name: load_model(artifact(name) / "model").state_dict() for name in WEIGHTINGS}
    for one, other in itertools.combinations(WEIGHTINGS, 2):
        gap = max(float((p - states[other][key]).abs().max()) for key, p in states[one].items())
        assert gap > 1e-3, (one, other)


def test_numbers_of_the_weightings(artifact: Any, read_rows: Any) -> None:
    remit = read_rows(artifact("remit") / "metrics.jsonl")
    shuffled = read_rows(artifact("shuffled") / "metrics.jsonl")
    for line in remit:
        histogram = torch.tensor(line["remit/weight_histogram"])
        assert histogram.shape == (20,)
        assert histogram.sum() == pytest.approx(1.0, abs=1e-5)
        assert histogram[:1].sum() == 0  # eps 0.8: no weight under 0.2 but in the bins from 0.2 on
        assert 0.5 < line["remit/mean_weight"] < 1.5
    # The control has the same weights on other tokens.
    assert shuffled[0]["remit/weight_histogram"] == remit[0]["remit/weight_histogram"]
    assert shuffled[0]["loss"] != remit[0]["loss"]
    for line in read_rows(artifact("rho1") / "metrics.jsonl"):
        assert line["rho1/kept_fraction"] == pytest.approx(0.6, abs=0.01)
        assert line["rho1/kept_excess"] > line["rho1/mean_excess"]
    for line in read_rows(artifact("distill") / "metrics.jsonl"):
        assert 0 < line["distill/covered"] < 1


def test_without_eps_it_is_plain_prediction_to_the_bit(artifact: Any, tmp_path: Path, hash_files: Any) -> None:
    settings = artifact.spec("remit")[1].model_copy(update={"eps": 0.0})
    artifact.run("midtrain", settings, artifact.inputs("remit"), tmp_path / "out")
    assert hash_files(tmp_path / "out" / "model") == hash_files(artifact("midtrain") / "model")
    assert hash_files(artifact("remit") / "model") != hash_files(artifact("midtrain") / "model")


@pytest.mark.parametrize("weighting", ["remit", "rho1", "distill", "plausible", "shuffled"])
def test_a_missing_reference_is_said(artifact: Any, tmp_path: Path, weighting: Any) -> None:
    with pytest.raises(UserError, match=rf"weighting {weighting} compares with a reference.*reference=MODEL"):
        artifact.run("midtrain", MidtrainSettings(weighting=weighting), artifact.inputs("midtrain"), tmp_path / "out")


def test_objectives_of_the_weightings() -> None:
    reads = {
        weighting: build_objective(MidtrainSettings(weighting=weighting, base=base)).reads  # type: ignore[arg-type]
        for weighting, base in [("ntp", "live"), ("remit", "live"), ("shuffled", "frozen"), ("rho1", "frozen")]
    }
    assert reads["ntp"] == ("weights",)
    assert set(reads["remit"]) == {"weights", "ref_logprobs"}
    assert set(reads["shuffled"]) == set(reads["rho1"]) == {"weights", "ref_logprobs", "base_logprobs"}
    both = [MidtrainSettings(weighting="plausible"), MidtrainSettings(weighting="shuffled", shuffles="plausible")]
    assert all(set(build_objective(s).reads) == {"weights", "ref_logprobs", "ref_topk"} for s in both)
    assert [s.reference_top_k for s in both] == [1, 1]
    assert build_objective(MidtrainSettings(weighting="distill")).needs.candidates is not None


@pytest.mark.parametrize("weighting", ["remit", "shuffled", "rho1"])
@pytest.mark.parametrize("base", ["live", "frozen"])
def test_a_date_as_a_seed(artifact: Any, tmp_path: Path, weighting: str, base: str) -> None:
    changes = {"weighting": weighting, "base": base, "seed": 20251122, "updates": 1}
    settings = artifact.spec("remit")[1].model_copy(update=changes)
    manifest = artifact.run("midtrain", settings, artifact.inputs("remit"), tmp_path / "out")
    assert manifest["summary"]["updates"] == 1
