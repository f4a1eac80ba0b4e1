"""`polm merge_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from polm.engine.score import score
from polm.errors import DataError
from polm.models.loading import load_model, load_tokenizer
from polm.recipe import MergeAdapterSettings, SFTSettings
from polm.stages import merge_adapter
from polm.stages.common import load_base, load_learner
from polm.text.tokenizer import fingerprint_tokenizer
from polm.tokens import build_document, collate

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "ia3": {"kind": "ia3"},
}


def score_forest(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return score(model.eval(), collate([build_document(list(range(3, 23)))])).logprobs_N


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_merged_model_says_what_the_adapter_said(kind: str, artifact: Any, tmp_path: Path) -> None:
    """Before the merge (adapter on its base, as it was trained) and after it, with transformers alone."""
    inputs = {"base": str(artifact("midtrain")), "data": str(artifact("data"))}
    optimizer = {"kind": "adamw", "learning_rate": 0.02}
    settings = SFTSettings(bin_tokens=192, precision="fp32", updates=3, optimizer=optimizer, adapter=KINDS[kind])
    artifact.run("sft", settings, inputs, tmp_path / "sft")
    learner = load_learner(
        merge_adapter.Context(tmp_path, {"base": str(tmp_path / "sft")}), SFTSettings(adapter={"kind": "continue"})
    )
    adapted = score_forest(learner.model)

    manifest = artifact.run("merge_adapter", MergeAdapterSettings(), {"model": str(tmp_path / "sft")}, tmp_path / "out")
    merged = load_model(tmp_path / "out" / "model")
    torch.testing.assert_close(score_forest(merged), adapted, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    ids = torch.arange(3, 23)
    with torch.no_grad():
        logprobs = torch.log_softmax(plain(input_ids=ids[None]).logits[0], -1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(logprobs, adapted, rtol=0, atol=1e-5)
    base = load_base(str(artifact("midtrain")))
    assert float((score_forest(base.model) - adapted).abs().max()) > 1e-2
    assert set(merged.state_dict()) == set(base.model.state_dict())
    assert fingerprint_tokenizer(load_tokenizer(tmp_path / "out" / "model")) == fingerprint_tokenizer(base.tokenizer)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "model")) == plain.config.vocab_size
    assert manifest["summary"]["parameters"] == sum(p.numel() for p in merged.parameters())
    assert merge_adapter.STAGE.kind == "transform"


def test_an_ordinary_model_has_nothing_to_merge(artifact: Any, tmp_path: Path) -> None:
    inputs = {"model": str(artifact("midtrain"))}
    with pytest.raises(DataError, match=r"is no adapter \(no adapter_config.json\): there is nothing to merge"):
        artifact.run("merge_adapter", MergeAdapterSettings(), inputs, tmp_path / "out")
