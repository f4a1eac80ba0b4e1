"""Helpers for the tests of stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polm.engine.score import score
from polm.models.loading import load_model
from polm.tokens import build_document, collate


@pytest.fixture(scope="session")
def read_manifest() -> Callable[[Path], dict[str, Any]]:
    return lambda folder: json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a JSON lines file."""
    return lambda path: [json.loads(raw) for raw in path.read_text(encoding="utf-8").split("\n") if raw]


@pytest.fixture(scope="session")
def check_trained(read_manifest: Any, read_rows: Any) -> Callable[[Path, Path | None], None]:
    """What holds for every training stage: an ordinary checkpoint, sums that add up, weights that have moved."""

    def check(folder: Path, base: Path | None) -> None:
        plain = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa")
        ours = load_model(folder / "model")
        ids = torch.arange(3, 23)
        with torch.no_grad():
            logits = plain(input_ids=ids[None], use_cache=False).logits[0].float()
            scores = score(ours, collate([build_document(ids.numpy())])).logprobs_N
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-5)
        assert len(AutoTokenizer.from_pretrained(folder / "model")) == plain.config.vocab_size
        if base is not None:
            before = load_model(base / "model").state_dict()
            changed = [name for name, p in ours.state_dict().items() if not torch.equal(p, before[name])]
            assert len(changed) == len(before), set(before) - set(changed)

        manifest = read_manifest(folder)
        summary, lines = manifest["summary"], read_rows(folder / "metrics.jsonl")
        assert summary["updates"] == len(lines) == lines[-1]["num_updates"]
        assert [line["update"] for line in lines] == list(range(1, len(lines) + 1))
        assert (summary["tokens"], summary["targets"]) == (lines[-1]["tokens"], lines[-1]["targets"])
        assert 0 < summary["targets"] < summary["tokens"]
        assert summary["last/loss"] == lines[-1]["loss"]
        assert summary["precision"] == "fp32"
        assert not list(folder.glob("*checkpoint*"))

    return check


@pytest.fixture(scope="session")
def check_packed(read_manifest: Any) -> Callable[[Path, int], None]:
    """The ledger of a stage that packs documents: nothing has gone astray."""

    def check(folder: Path, bin_tokens: int) -> None:
        ledger = read_manifest(folder)["ledger"]
        assert ledger["tokens_read"] == ledger["tokens_kept"] + ledger.get("tokens_lost", 0)
        assert ledger["read"] == ledger["kept"] + ledger.get("dropped", 0)
        assert ledger["bins"] * bin_tokens == ledger["tokens_kept"] + ledger["tokens_of_room_unused"]
        assert 0 < ledger["tokens_supervised"] < ledger["tokens_kept"]

    return check
