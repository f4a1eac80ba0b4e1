"""`polm sft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polm.data.readers import read_conversations
from polm.errors import DataError, ModelError
from polm.models.loading import load_tokenizer
from polm.recipe import SFTSettings


def test_a_turn(artifact: Any, check_trained: Any, check_packed: Any, read_rows: Any) -> None:
    folder = artifact("sft")
    check_trained(folder, artifact("midtrain"))
    check_packed(folder, 192)
    losses = [line["loss"] for line in read_rows(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_the_ledger_against_the_texts(artifact: Any, read_manifest: Any) -> None:
    """Recounted with the bare tokenizer: role marker, question, role marker, answer, end."""
    tokenizer = load_tokenizer(artifact("sft") / "model")
    count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    chats = [c.messages for c in read_conversations(artifact("data") / "sft.jsonl")]
    answers = sum(count(chat[1]["content"]) + 1 for chat in chats)
    questions = sum(count(chat[0]["content"]) + 2 for chat in chats)
    ledger = read_manifest(artifact("sft"))["ledger"]
    assert (ledger["read"], ledger["kept"]) == (24, 24)
    assert ledger["tokens_supervised"] == answers
    assert ledger["tokens_read"] == answers + questions
    assert read_manifest(artifact("sft"))["summary"]["targets"] == answers  # one epoch


def test_the_answer_is_marked(artifact: Any) -> None:
    text = (artifact("sft") / "example.txt").read_text().strip()
    first = read_conversations(artifact("data") / "sft.jsonl")[0].messages
    before, marked = text.rstrip("⟧").split("⟦")
    assert marked.replace(" ", "") == (first[1]["content"] + "<|eos|>").replace(" ", "")
    assert before.replace(" ", "") == f"<|user|>{first[0]['content']}<|assistant|>".replace(" ", "")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_a_file_in_place_of_the_folder(artifact: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", [chat("add 1 and 2 .", "#### 3"), chat("add 2 and 2 .", "#### 4")])
    inputs = {"base": str(artifact("midtrain")), "data": data}
    manifest = artifact.run("sft", SFTSettings(bin_tokens=64, updates=1), inputs, tmp_path / "out")
    assert manifest["ledger"]["read"] == 2


def test_weights_of_the_data_are_honoured(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """The same two chats, once with the second at weight 0: what is logged is the first one's loss alone."""

    def train(name: str, *rows: dict[str, Any]) -> tuple[dict[str, Any], float]:
        inputs = {"base": str(artifact("midtrain")), "data": write(tmp_path / f"{name}.jsonl", list(rows))}
        settings = SFTSettings(bin_tokens=64, updates=1, precision="fp32")
        manifest = artifact.run("sft", settings, inputs, tmp_path / name)
        return manifest["ledger"], read_rows(tmp_path / name / "metrics.jsonl")[0]["loss"]

    first, second = chat("add 1 and 2 .", "#### 3"), chat("add 2 and 2 .", "#### 4")
    answers = [first["messages"], second["messages"]]
    ignored = {"messages": [*answers[0], answers[1][0], {**answers[1][1], "weight": 0}]}
    halved = {"messages": [{**m, "weight": 0.5} if m["role"] == "assistant" else m for m in answers[0]]}
    ledger, loss = train("whole", first)
    both = train("both", {"messages": [*answers[0], *answers[1]]})
    none = train("none", ignored)
    half = train("half", halved, second)
    assert none[0]["tokens_supervised"] == ledger["tokens_supervised"] == 3
    assert none[1] == pytest.approx(loss, rel=1e-5)
    assert both[0]["tokens_supervised"] == 6
    assert abs(both[1] - loss) > 1e-3
    assert half[0]["tokens_weighted"] == 3
    alone = train("alone", second)[1]
    assert half[1] == pytest.approx((0.5 * loss + alone) / 1.5, rel=1e-5)
    example = (tmp_path / "none" / "example.txt").read_text()
    assert example.endswith("⟧<|user|> add 2 and 2 . <|assistant|> #### 4 <|eos|>\n")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("truncate", {"truncated": 1, "kept": 2}), ("drop", {"dropped": 1, "kept": 1})],
)
def test_long_conversations(artifact: Any, tmp_path: Path, policy: str, expected: dict[str, int]) -> None:
    data = write(tmp_path / "mine.jsonl", [chat("add 1 and 2 .", "#### 3"), chat("add 1 and 2 .", "1 " * 100)])
    inputs = {"base": str(artifact("midtrain")), "data": data}
    settings = {"bin_tokens": 64, "updates": 1, "too_long": policy}
    manifest = artifact.run("sft", SFTSettings(**settings), inputs, tmp_path / "out")
    assert {name: manifest["ledger"].get(name, 0) for name in expected} == expected


def test_mistakes(artifact: Any, tmp_path: Path) -> None:
    base = str(artifact("midtrain"))
    settings = SFTSettings(bin_tokens=64, updates=1)

    def run(data: str, out: str, changes: dict[str, Any] | None = None) -> None:
        artifact.run("sft", settings.model_copy(update=changes or {}), {"base": base, "data": data}, tmp_path / out)

    long = write(tmp_path / "long.jsonl", [chat("add 1 and 2 .", "1 " * 100)])
    with pytest.raises(DataError, match=r"conversation 0 has 1\d\d tokens, and the context is 64.*too_long: truncate"):
        run(long, "a")
    with pytest.raises(DataError, match=r"data: expected the file sft.jsonl in .*nowhere.*\(found: no such folder\)"):
        run(str(tmp_path / "nowhere"), "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"expected the file sft.jsonl in .*\(found: train.jsonl\)"):
        run(str(tmp_path / "empty"), "c")
    with pytest.raises(ModelError, match="template"):
        run(str(artifact("data")), "d", {"chat_template": "chatml"})  # its control tokens are not in the vocabulary


def test_tokenizer_and_model_must_belong_together(artifact: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "mixed"
    shutil.copytree(artifact("midtrain") / "model", folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(5)])
    tokenizer.save_pretrained(folder)
    inputs = {"base": str(folder), "data": str(artifact("data"))}
    with pytest.raises(
        ModelError, match=r"has \d+ tokens and the model only \d+ embeddings; they do not belong together"
    ):
        artifact.run("sft", SFTSettings(), inputs, tmp_path / "out")
