"""`polm tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from polm.data.readers import read_documents
from polm.errors import DataError, UserError
from polm.recipe import TokenizerSettings
from polm.text.tokenizer import fingerprint_tokenizer, normalise_words


def test_an_ordinary_folder(artifact: Any, read_manifest: Any) -> None:
    folder = artifact("tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = read_documents(artifact("data") / "pretrain.jsonl")
    for text in texts[:20]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert normalise_words(tokenizer.decode(ids)) == normalise_words(text)
    summary = read_manifest(folder)["summary"]
    assert summary["vocabulary"] == len(tokenizer) <= 200
    assert summary["fingerprint"] == fingerprint_tokenizer(tokenizer)
    num_bytes = sum(len(text.encode()) for text in texts[:200])
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts[:200])
    assert summary["bytes_per_token"] == pytest.approx(num_bytes / num_tokens)
    assert read_manifest(folder)["ledger"] == {"documents": 240, "sample_unknown": 0}


def test_words_that_do_not_fit_are_counted(artifact: Any, tmp_path: Path) -> None:
    inputs = artifact.inputs("tokenizer")
    manifest = artifact.run("tokenizer", TokenizerSettings(kind="word", vocab_size=60), inputs, tmp_path / "small")
    assert manifest["summary"]["vocabulary"] == 60
    assert manifest["ledger"]["sample_unknown"] > 100


@pytest.mark.parametrize("kind", ["bpe", "word", "byte"])
def test_a_bad_line_is_named(kind: str, artifact: Any, tmp_path: Path) -> None:
    """Also where it is read within the training of the vocabulary, which is not Python."""
    (tmp_path / "pretrain.jsonl").write_text('{"text": "add 1 and 2 ."}\n' * 600 + '{"text": 3}\n')
    settings = TokenizerSettings(kind=kind, vocab_size=300)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"pretrain\.jsonl:601: text must be a string"):
        artifact.run("tokenizer", settings, {"data": str(tmp_path)}, tmp_path / "out")


def test_settings_that_cannot_work(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat"):
        artifact.run(
            "tokenizer", TokenizerSettings(chat_template="nonsense"), artifact.inputs("tokenizer"), tmp_path / "x"
        )
