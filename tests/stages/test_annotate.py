"""`polm annotate`, and how a training stage reads what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from polm.data.examples import build_document_trees
from polm.data.readers import read_documents
from polm.engine.score import score, score_top_k
from polm.errors import ModelError, UserError
from polm.models.loading import load_model, load_tokenizer
from polm.recipe import AnnotateSettings, MidtrainSettings
from polm.stages import common
from polm.stages.common import new_ledger
from polm.tokens import Tree, collate

Trees = list[Tree]


@pytest.fixture
def trees(artifact: Any) -> Trees:
    tokenizer = load_tokenizer(artifact("grpo") / "model")
    texts = read_documents(artifact("data") / "midtrain.jsonl")
    return build_document_trees(tokenizer, texts, context=192, too_long="split", ledger=new_ledger())


def test_scores_are_those_of_the_model(artifact: Any, trees: Trees, read_manifest: Any) -> None:
    """Document by document, against scoring each on its own."""
    folder = artifact("annotate")
    arrays = load_file(folder / "scores.safetensors")
    model = load_model(artifact("grpo") / "model").eval()
    offset, total = 0, 0.0
    for tree in trees:
        batch = collate([tree])
        with torch.no_grad():
            alone = score(model, batch).logprobs_N.numpy()
            _, top_ids, top_logprobs = score_top_k(model, batch, 4)
        part = slice(offset + 1, offset + len(tree[0]))
        np.testing.assert_allclose(arrays["logprobs"][part], alone, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(arrays["top_logprobs"][part], top_logprobs.numpy(), rtol=1e-4, atol=2e-5)
        assert (arrays["top_ids"][part] == top_ids.numpy()).mean() > 0.99  # near ties may change places
        assert arrays["logprobs"][offset] == 0.0
        offset += len(tree[0])
        total += float(alone.sum())
    assert len(arrays["logprobs"]) == offset
    summary = read_manifest(folder)["summary"]
    assert summary["mean_logprob"] == pytest.approx(total / summary["targets"], rel=1e-4)
    assert summary["targets"] == offset - len(trees)


def test_the_fingerprint_names_model_tokenizer_and_data(artifact: Any) -> None:
    found = json.loads((artifact("annotate") / "fingerprint.json").read_text())
    assert found.keys() == {"model", "tokenizer", "data", "top_k"}
    assert found["top_k"] == 4


@pytest.mark.parametrize("data", ["sft", "preferences"])
def test_other_kinds_of_data(artifact: Any, tmp_path: Path, data: str) -> None:
    inputs = {"model": str(artifact("sft")), "data": str(artifact("pairs" if data == "preferences" else "data"))}
    settings = AnnotateSettings(data=data, precision="fp32")  # type: ignore[arg-type]
    manifest = artifact.run("annotate", settings, inputs, tmp_path / "out")
    assert manifest["summary"]["targets"] == manifest["ledger"]["tokens_supervised"] > 0


# ---- reading -------------------------------------------------------------------------------------------------------


def midtrain(artifact: Any, reference: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = artifact.spec("remit")[1].model_copy(update={"updates": 1, **changes})
    inputs = {**artifact.inputs("midtrain"), "reference": str(reference)}
    manifest: dict[str, Any] = artifact.run("midtrain", settings, inputs, out)
    return manifest


def test_scores_and_the_model_itself_are_the_same(artifact: Any, tmp_path: Path) -> None:
    midtrain(artifact, artifact("annotate"), tmp_path / "by-scores")
    midtrain(artifact, artifact("grpo"), tmp_path / "by-model")
    weights = [load_model(tmp_path / name / "model").state_dict() for name in ("by-scores", "by-model")]
    for name, p in weights[0].items():
        torch.testing.assert_close(p, weights[1][name], rtol=1e-3, atol=1e-4)


def test_scores_of_other_documents_are_refused(artifact: Any, tmp_path: Path) -> None:
    texts = [json.dumps({"text": text}) for text in read_documents(artifact("data") / "midtrain.jsonl")]
    (tmp_path / "midtrain.jsonl").write_text("\n".join(texts[:-1]) + "\n")
    inputs = {**artifact.inputs("remit"), "data": str(tmp_path / "midtrain.jsonl")}
    with pytest.raises(
        UserError, match=r"were made with another data \(fingerprint .*run `polm annotate` with this data"
    ):
        artifact.run("midtrain", artifact.spec("remit")[1], inputs, tmp_path / "out")


def test_scores_of_documents_that_were_cut_otherwise_are_refused(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another data .* and with max_tokens set to this stage"):
        midtrain(artifact, artifact("annotate"), tmp_path / "out", bin_tokens=24)


def test_scores_with_another_tokenizer_are_refused(artifact: Any, other_model: Path, tmp_path: Path) -> None:
    inputs = {"model": str(other_model), "data": str(artifact("data"))}
    artifact.run("annotate", AnnotateSettings(max_tokens=192, precision="fp32"), inputs, tmp_path / "scores")
    with pytest.raises(
        UserError, match=r"were made with another tokenizer \(.*run `polm annotate` with this tokenizer"
    ):
        midtrain(artifact, tmp_path / "scores", tmp_path / "out")


def test_a_model_with_another_tokenizer_is_refused(artifact: Any, other_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"do not have the same tokenizer: .*Cure: take a"):
        midtrain(artifact, other_model, tmp_path / "out")


def test_too_few_likeliest_tokens_are_refused(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep the top 4 tokens, 5 are needed; annotate with top_k=5"):
        midtrain(artifact, artifact("annotate"), tmp_path / "out", weighting="distill", top_k=5)
    midtrain(artifact, artifact("annotate"), tmp_path / "less", weighting="distill", top_k=2)


def test_damaged_scores_are_named(artifact: Any, tmp_path: Path) -> None:
    import shutil

    for number, (name, damage) in enumerate(
        [
            ("scores.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
            ("fingerprint.json", lambda p: p.unlink()),
            ("fingerprint.json", lambda p: p.write_text("{")),
        ]
    ):
        folder = tmp_path / f"scores{number}"
        shutil.copytree(artifact("annotate"), folder)
        (folder / "manifest.json").unlink()  # else the manifest gives it away already
        damage(folder / name)
        with pytest.raises(UserError, match=rf"scores{number}.*annotate again"):
            midtrain(artifact, folder, tmp_path / f"out{number}")


def test_a_reference_is_scored_once(artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run has left is read again, if it belongs to the very same model and data."""
    calls: list[int] = []
    real = common.annotate_trees

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(common, "annotate_trees", count)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "train_on_trees", stop)
        from polm.stages import midtrain as stage

        patch.setattr(stage, "train_on_trees", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                midtrain(artifact, artifact("grpo"), tmp_path / "out")
    assert len(calls) == 1
    (tmp_path / "out" / "scores-reference" / "fingerprint.json").write_text('{"model": "another"}')
    midtrain(artifact, artifact("grpo"), tmp_path / "out")
    assert len(calls) == 2


def test_a_frozen_base_is_the_model_as_it_was_given(artifact: Any, trees: Trees, tmp_path: Path) -> None:
    midtrain(artifact, artifact("annotate"), tmp_path / "out", base="frozen")
    arrays = load_file(tmp_path / "out" / "scores-base" / "scores.safetensors")
    model = load_model(artifact("pretrain") / "model").eval()
    with torch.no_grad():
        first = score(model, collate(trees[:1])).logprobs_N.numpy()
    np.testing.assert_allclose(arrays["logprobs"][1 : len(trees[0][0])], first, rtol=1e-4, atol=2e-5)


def test_settings_that_the_graph_gives() -> None:
    """`annotate` after midtrain's settings reads exactly the documents that midtrain will read."""
    from polm.flywheel.graph import annotate_settings

    midtrain_settings = MidtrainSettings(bin_tokens=100, too_long="truncate", weighting="distill", top_k=7)
    found = annotate_settings(midtrain_settings)
    assert (found.max_tokens, found.bin_tokens, found.too_long, found.top_k) == (100, 100, "truncate", 7)
    assert annotate_settings(MidtrainSettings(weighting="remit", top_k=7)).top_k == 0
