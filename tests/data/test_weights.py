"""A user's weights for messages, tokens and documents, through packing into the batch that an objective sees."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polm.data.build import build_files_dataset
from polm.data.examples import Ledger, build_conversation_trees, build_document_trees
from polm.data.packing import pack_trees
from polm.data.readers import read_conversations, read_weighted_documents
from polm.errors import DataError
from polm.objectives.ntp import build_ntp
from polm.recipe_data import FilesData, MixedSource
from polm.tokens import Scores, TokenBatch, Tree

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *"abcdefghij"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> "
    "{% generation %}{{ m['content'] }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def pack(trees: list[Tree], bin_tokens: int) -> TokenBatch:
    """Everything in one bin, as one micro-batch."""
    packed = pack_trees(trees, bin_tokens=bin_tokens, bins_per_update=1, micro_bins=0, updates=1, epochs=None, seed=0)
    assert len(packed.bins) == 1
    (batch,) = packed.step(0).batches
    return batch


def show(batch: TokenBatch) -> list[tuple[str, float]]:
    """(token, weight) over the stream, documents in a fixed order."""
    pairs = list(zip(batch.tokens_T.tolist(), batch.streams["weights"].tolist(), strict=True))
    documents: dict[int, list[tuple[str, float]]] = {}
    for segment, (token, weight) in zip(batch.segments_T.tolist(), pairs, strict=True):
        documents.setdefault(segment, []).append((WORDS[token], weight))
    return [pair for document in sorted(documents.values()) for pair in document]


def weigh(
    words: PreTrainedTokenizerFast, folder: Path, rows: list[Any], train_on: Any = "all"
) -> tuple[TokenBatch, Ledger]:
    """From a user's file through the `data` stage's converter, the reader of `sft` and packing to the batch."""
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    build_files_dataset(FilesData(source="files", sft=(MixedSource(path=str(folder / "mine.jsonl")),)), out)
    ledger: Ledger = Counter()
    trees = build_conversation_trees(
        words, read_conversations(out / "sft.jsonl"), context=32, too_long="error", train_on=train_on, ledger=ledger
    )
    return pack(trees, 64), ledger


ROWS = [
    # weight 0 = context only; 0.5 for the second answer, whose second token counts twice that
    {"messages": [user("a"), bot("b c", weight=0), user("d"), bot("e f", weight=0.5, token_weights=[1, 2, 0])]},
    # a weight for the record, and token weights that leave the end of turn at 1
    {"messages": [user("g"), bot("h i", token_weights=[0, 1])], "weight": 3},
]
EXPECTED = [
    *[("<user>", 0), ("a", 0), ("<bot>", 0), ("b", 0), ("c", 0), ("<eos>", 0)],
    *[("<user>", 0), ("d", 0), ("<bot>", 0), ("e", 0.5), ("f", 1.0), ("<eos>", 0)],
    *[("<user>", 0), ("g", 0), ("<bot>", 0), ("h", 0), ("i", 3.0), ("<eos>", 3.0)],
]


def test_weights_of_messages_and_tokens_reach_the_batch(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    batch, ledger = weigh(words, tmp_path, ROWS)
    assert show(batch) == EXPECTED
    assert batch.targets_N.shape == (4,)  # what weighs nothing is no target
    assert (ledger["tokens_supervised"], ledger["tokens_weighted"], ledger["tokens_masked"]) == (4, 3, 14)


def test_the_loss_is_weighed(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """sum w * (-log p) over sum w, by hand: targets in the order of the stream."""
    batch, _ = weigh(words, tmp_path, ROWS)
    by_token = {"e": -1.0, "f": -2.0, "i": -3.0, "<eos>": -4.0}
    logprobs = torch.tensor([by_token[WORDS[t]] for t in batch.target_tokens_N.tolist()])
    loss = build_ntp().compute(Scores(logprobs), batch)
    assert loss.total.item() == pytest.approx(0.5 * 1 + 1 * 2 + 3 * 3 + 3 * 4)
    assert loss.denominator.item() == pytest.approx(0.5 + 1 + 3 + 3)


def test_train_on_last_and_a_weight_of_zero_meet(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"messages": [user("a"), bot("b"), user("c"), bot("d", weight=0)]}, {"messages": [user("e"), bot("f")]}]
    batch, ledger = weigh(words, tmp_path, rows, train_on="last")
    assert [pair for pair in show(batch) if pair[1]] == [("f", 1.0), ("<eos>", 1.0)]
    assert (ledger["dropped_unsupervised"], ledger["kept"], "tokens_weighted" in ledger) == (1, 1, False)


def test_token_weights_of_another_tokenizer_are_refused(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"messages": [user("a"), bot("b c", token_weights=[1])]}]
    with pytest.raises(DataError, match=r"conversation 0: message 1 has 1 token_weights and 3 tokens .*\(b c <eos>\)"):
        weigh(words, tmp_path, rows)
    rows = [{"messages": [user("a"), bot("b", token_weights=[1, 1, 1])]}]
    with pytest.raises(DataError, match="message 1 has 3 token_weights and 2 tokens"):
        weigh(words, tmp_path, rows)


def weigh_documents(
    words: PreTrainedTokenizerFast, path: Path, too_long: Any, context: int
) -> tuple[list[Tree], Ledger]:
    ledger: Ledger = Counter()
    trees = build_document_trees(
        words, read_weighted_documents(path), context=context, too_long=too_long, ledger=ledger
    )
    return trees, ledger


def test_documents_carry_weights_also_when_they_are_split(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": "a b c d e", "weight": 0.5, "token_weights": [1, 2, 3, 4, 0]}, {"text": "f g"}]
    (tmp_path / "midtrain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees, ledger = weigh_documents(words, tmp_path / "midtrain.jsonl", "split", 4)
    expected = [
        ("a", 0),
        ("b", 1.0),
        ("c", 1.5),
        ("d", 2.0),
        ("e", 0),
        ("<eos>", 0.5),
        ("f", 0),
        ("g", 1),
        ("<eos>", 1),
    ]
    assert show(pack(trees, 16)) == expected  # the first token of a piece has no predictor
    assert (ledger["split"], ledger["tokens_weighted"], ledger["tokens_supervised"]) == (1, 3, 6)
    words.bos_token = "<bot>"
    trees, _ = weigh_documents(words, tmp_path / "midtrain.jsonl", "truncate", 4)
    assert show(pack(trees, 16))[:4] == [("<bot>", 0), ("a", 0.5), ("b", 1.0), ("c", 1.5)]


def test_a_document_of_weight_zero_is_dropped_and_counted(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": "a b", "weight": 0}, {"text": "c d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees, ledger = weigh_documents(words, tmp_path / "a.jsonl", "error", 9)
    assert len(trees) == 1
    assert (ledger["dropped_unsupervised"], ledger["tokens_lost"], ledger["tokens_kept"]) == (1, 3, 3)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a b", "token_weights": [1]}) + "\n")
    with pytest.raises(DataError, match=r"document 0 has 1 token_weights and 2 tokens .*\(a b\)"):
        weigh_documents(words, tmp_path / "b.jsonl", "error", 9)
