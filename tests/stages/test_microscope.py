"""`microscope`: weights by hand, the same as training's, and the tables over the vocabulary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polm.data.readers import read_documents
from polm.engine.score import score
from polm.errors import ModelError, UserError
from polm.models.loading import load_model, load_tokenizer
from polm.objectives.remit import build_remit
from polm.recipe import MicroscopeSettings, MidtrainSettings
from polm.stages.microscope import Text, choose_shown, compute_weights, measure, name_token, spell_tokens
from polm.stages.midtrain import build_objective
from polm.text.tokenizer import train_tokenizer
from polm.tokens import Scores, build_document, collate

SETTINGS = MicroscopeSettings(eps=0.8, bin_tokens=192, precision="fp32", min_count=3, top=5, num_documents=12)


def look(artifact: Any, out: Path, reference: str = "grpo", **changes: Any) -> tuple[list[dict[str, Any]], Any, Any]:
    inputs = {name: str(artifact(name)) for name in ("data",)}
    inputs |= {"base": str(artifact("pretrain")), "reference": str(artifact(reference))}
    manifest = artifact.run("microscope", SETTINGS.model_copy(update=changes), inputs, out)
    rows = [json.loads(raw) for raw in (out / "microscope.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, json.loads((out / "tokens.json").read_text()), manifest


def score_row(folder: Path, text: str) -> Any:
    """Plain log-probabilities of a document under a saved model, alone in its batch."""
    tokenizer = load_tokenizer(folder / "model")
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        batch = collate([build_document(ids)])
        return score(load_model(folder / "model"), batch).logprobs_N.numpy(), ids


def test_numbers_by_hand(artifact: Any, tmp_path: Path) -> None:
    """delta = log p_R - log p_theta; w = clip(2 sigmoid(delta - its mean over the document), 0.2, 1.8)."""
    rows, _, _ = look(artifact, tmp_path / "out")
    texts = read_documents(artifact("data") / "midtrain.jsonl")
    documents = [row for row in rows if row["kind"] == "document"]
    assert len(documents) == 12
    for row in documents:
        text = texts[int(row["id"].removeprefix("line ")) - 1]
        reference, ids = score_row(artifact("grpo"), text)
        base, _ = score_row(artifact("pretrain"), text)
        assert len(row["tokens"]) == len(ids) == row["num_tokens"]
        assert row["weight"][0] is row["delta"][0] is row["logp_ref"][0] is None
        np.testing.assert_allclose(row["logp_ref"][1:], reference, atol=2e-4)
        np.testing.assert_allclose(row["logp_base"][1:], base, atol=2e-4)
        delta = (reference - base).tolist()
        mean = sum(delta) / len(delta)
        expected = [min(1.8, max(0.2, 2 / (1 + math.exp(mean - d)))) for d in delta]
        np.testing.assert_allclose(row["weight"][1:], expected, atol=2e-4)
    assert any(abs(w - 1) > 0.01 for row in documents for w in row["weight"][1:])


@pytest.mark.parametrize(
    ("weighting", "shuffles"),
    [("remit", "remit"), ("shuffled", "remit"), ("rho1", "remit"), ("plausible", "remit"), ("shuffled", "plausible")],
)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_weights_are_those_of_the_objective(weighting: Any, shuffles: Any, scope: Any) -> None:
    """Read out of the objective by its gradient: d total / d log p = -weight. Both see one tree (or one batch)."""
    generator = np.random.default_rng(0)
    trees = []
    for length in (9, 17, 5):
        streams = {name: -generator.random(length).astype(np.float32) * 5 for name in ("ref_logprobs", "base_logprobs")}
        best = streams["ref_logprobs"] + generator.random(length).astype(np.float32)
        trees.append(build_document(np.arange(length), {**streams, "ref_topk": best[:, None]}))
    same = {"eps": 0.6, "temperature": 0.7, "keep": 0.4, "scope": scope, "gamma": 0.8, "floor": 0.5}
    settings = MicroscopeSettings(weighting=weighting, shuffles=shuffles, seed=3, **same)
    objective = build_objective(MidtrainSettings(weighting=weighting, shuffles=shuffles, base="frozen", **same))
    batch = collate(trees, seed=3)
    logprobs_N = batch.at_targets("base_logprobs").clone().requires_grad_()
    objective.compute(Scores(logprobs_N), batch).total.backward()
    assert logprobs_N.grad is not None
    found = [one.weight for one in measure(trees, settings)]
    assert all(weight is not None for weight in found)
    np.testing.assert_allclose(np.concatenate(found), -logprobs_N.grad.numpy(), atol=1e-6)  # type: ignore[arg-type]
    assert [len(weight) for weight in found if weight is not None] == [8, 16, 4]


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    streams = {"ref_logprobs": np.array([0, -1, -2, -0.5], np.float32), "base_logprobs": np.full(4, -1, np.float32)}
    one = build_document([1, 2, 3, 4], streams)
    other = build_document([5, 6], {"ref_logprobs": np.array([0, -9.0]), "base_logprobs": np.array([0, -1.0])})
    alone = measure([one], SETTINGS)[0].weight
    beside = measure([other, one], SETTINGS)[1].weight
    np.testing.assert_array_equal(alone, beside)
    objective = build_remit(
        eps=0.8, temperature=1.0, centring="sequence", base="frozen", denominator="tokens", shuffled=False
    )
    batch = collate([one])
    total = objective.compute(Scores(batch.at_targets("base_logprobs")), batch).total
    assert float(total) == pytest.approx(float(np.sum(alone)))  # type: ignore[arg-type]


def test_distill_has_differences_only(artifact: Any, tmp_path: Path) -> None:
    rows, tables, manifest = look(artifact, tmp_path / "out", weighting="distill")
    assert {row["weight"] for row in rows} == {None}
    assert all(row["delta"][1] is not None for row in rows)
    assert tables["mean_weight"] is None
    assert sum(tables["histogram"]) == 0
    assert [one["delta"] for one in tables["lifted"]] == sorted((o["delta"] for o in tables["lifted"]), reverse=True)
    assert "mean_weight" not in manifest["summary"]
    batch = collate([build_document([1, 2])])
    assert compute_weights(torch.zeros(1), batch, MicroscopeSettings(weighting="distill")) is None


def test_rho1_is_nought_or_one(artifact: Any, tmp_path: Path) -> None:
    rows, tables, _ = look(artifact, tmp_path / "out", weighting="rho1", keep=0.25)
    assert {w for row in rows for w in row["weight"][1:]} == {0.0, 1.0}
    assert tables["mean_weight"] == pytest.approx(0.25, abs=1e-3)


def test_the_tables_say_whose_weights_are_shuffled(artifact: Any, tmp_path: Path) -> None:
    _, tables, _ = look(artifact, tmp_path / "out", weighting="shuffled", shuffles="plausible")
    assert (tables["weighting"], tables["shuffles"]) == ("shuffled", "plausible")


def test_tables_add_up(artifact: Any, tmp_path: Path) -> None:
    _, tables, manifest = look(artifact, tmp_path / "out")
    documents = json.loads((artifact("data") / "summary.json").read_text())["files"]["midtrain.jsonl"]["num_records"]
    assert tables["num_documents"] == documents == manifest["ledger"]["documents"]
    assert sum(one["count"] for one in tables["sources"]) == tables["num_tokens"] == sum(tables["histogram"])
    mean = sum(one["count"] * one["weight"] for one in tables["sources"]) / tables["num_tokens"]
    assert mean == pytest.approx(tables["mean_weight"])
    lifted, damped = tables["lifted"], tables["damped"]
    assert len(lifted) == len(damped) == 5
    assert [one["weight"] for one in lifted] == sorted((one["weight"] for one in lifted), reverse=True)
    assert [one["weight"] for one in damped] == sorted(one["weight"] for one in damped)
    assert damped[-1]["weight"] <= lifted[-1]["weight"]
    assert all(one["count"] >= 3 for one in lifted + damped)
    assert not {one["token"] for one in lifted} & {one["token"] for one in damped}


def test_a_sample_is_bounded_and_drawn_from_the_seed(artifact: Any, tmp_path: Path) -> None:
    small = {"max_tokens": 100, "num_documents": 3, "num_solutions": 1, "max_shown": 6}
    rows, tables, _ = look(artifact, tmp_path / "a", **small)
    assert 99 - len(rows) <= tables["num_tokens"] < 100 + 192
    assert [row["kind"] for row in rows] == ["document"] * 3 + ["benchmark"] * 10
    assert all(len(row["tokens"]) <= 6 and row["num_tokens"] >= len(row["tokens"]) for row in rows)
    assert all(row["num_prompt"] > 0 for row in rows if row["kind"] == "benchmark")
    again, _, _ = look(artifact, tmp_path / "b", **small)
    assert again == rows
    other, _, _ = look(artifact, tmp_path / "c", **small, seed=1)
    assert [row["id"] for row in other[:3]] != [row["id"] for row in rows[:3]]


def test_from_an_annotation(artifact: Any, tmp_path: Path) -> None:
    """Scores that are there already are taken; of benchmarks there are none."""
    rows, tables, manifest = look(artifact, tmp_path / "a")
    same, same_tables, same_manifest = look(artifact, tmp_path / "b", reference="annotate")
    assert manifest["ledger"]["solutions"] > 0
    assert same_manifest["ledger"]["solutions"] == 0
    assert [row["id"] for row in same] == [row["id"] for row in rows if row["kind"] == "document"]
    for one, two in zip(same, rows, strict=False):
        np.testing.assert_allclose(one["weight"][1:], two["weight"][1:], atol=2e-4)
    assert same_tables["mean_weight"] == pytest.approx(tables["mean_weight"], abs=1e-4)
    with pytest.raises(UserError, match="were made with another data"):
        look(artifact, tmp_path / "c", reference="annotate", bin_tokens=8)


def test_another_tokenizer_is_refused(artifact: Any, other_model: Path, tmp_path: Path) -> None:
    inputs = {"base": str(artifact("pretrain")), "reference": str(other_model), "data": str(artifact("data"))}
    with pytest.raises(ModelError, match="do not have the same tokenizer"):
        artifact.run("microscope", SETTINGS, inputs, tmp_path / "out")


def test_shown_documents_are_spread_over_sources() -> None:
    texts = [Text("document", label, str(i), build_document([1, 2])) for i, label in enumerate("aaaaabbc")]
    assert [texts[i].label for i in choose_shown(texts, 5)] == ["a", "a", "b", "b", "c"]
    assert choose_shown(texts, 99) == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["bpe", "word", "byte"])
def test_spelling_of_tokens(kind: Any) -> None:
    text = "x = 47 , ( a + b ) the naïve <b> the"
    tokenizer = train_tokenizer([text] * 3, kind=kind, vocab_size=400)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = spell_tokens(tokenizer, ids)
    assert len(pieces) == len(ids)
    joined = "".join(pieces).replace("\ufffd", "")
    assert joined == text
    names = {name_token(tokenizer, token) for token in set(ids)}
    assert len(names) == len(set(ids))  # two entries never read the same
