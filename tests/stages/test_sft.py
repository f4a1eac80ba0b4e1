"""`polm sft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polm.config import find_recipe, load_settings, recipe_folder
from polm.data.readers import read_conversations
from polm.errors import DataError, ModelError
from polm.models.loading import load_tokenizer
from polm.recipe import SFTSettings
from polm.stages import sft
from polm.stages.common import Context


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


@pytest.mark.parametrize("name", sorted(path.stem for path in (recipe_folder() / "sft").glob("*.yaml")))
def test_shipped_recipes_run(name: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """Two updates on the tiny model; the method shows in what is measured."""
    words = ["epochs=null", "updates=2", "bin_tokens=192", "bins_per_update=2", "micro_bins=0", "precision=fp32"]
    words += ["optimizer.learning_rate=0.01", "schedule.warmup_updates=0", "checkpoint_every=0"]
    settings = load_settings(SFTSettings, find_recipe(f"sft/{name}"), words, section="sft")
    artifact.run("sft", settings, artifact.inputs("sft"), tmp_path / "out")
    plain = settings.model_copy(update={"loss": "nll", "neftune_alpha": 0.0})
    artifact.run("sft", plain, artifact.inputs("sft"), tmp_path / "plain")
    lines, expected = (read_rows(tmp_path / folder / "metrics.jsonl") for folder in ("out", "plain"))
    assert lines[1]["ntp/nll"] < lines[0]["ntp/nll"]
    if settings.loss == "dft":
        assert lines[0]["ntp/nll"] == expected[0]["ntp/nll"]  # before the first update
        assert lines[0]["loss"] < lines[0]["ntp/nll"]
        assert 0.0 < lines[0]["dft/probability"] < 1.0
    elif settings.neftune_alpha:  # the likelihood under noise is another one
        assert abs(lines[0]["ntp/nll"] - expected[0]["ntp/nll"]) > 1e-3


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_a_stopped_run_goes_on_to_the_same_noise(loss: str, artifact: Any, hash_files: Any, tmp_path: Path) -> None:
    changes = {"loss": loss, "neftune_alpha": 5.0, "updates": 4, "checkpoint_every": 2, "micro_bins": 1}
    settings = SFTSettings(bin_tokens=64, bins_per_update=2, precision="fp32", **changes)
    quiet = {"inputs": artifact.inputs("sft"), "say": lambda _: None}

    def stop(line: Any) -> None:
        if line["update"] == 3:
            raise InterruptedError

    sft.run(settings, Context(tmp_path / "whole", **quiet))
    with pytest.raises(InterruptedError):
        sft.run(settings, Context(tmp_path / "parts", report=stop, **quiet))
    sft.run(settings, Context(tmp_path / "parts", **quiet))
    assert hash_files(tmp_path / "parts") == hash_files(tmp_path / "whole")
    sft.run(settings.model_copy(update={"neftune_alpha": 0.0}), Context(tmp_path / "plain", **quiet))
    assert hash_files(tmp_path / "plain") != hash_files(tmp_path / "whole")


def test_weights_of_the_data_with_both_methods(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """An answer of weight 0 is context, and one of weight 0.5 counts half, in DFT too."""
    first, second = chat("add 1 and 2 .", "#### 3"), chat("add 2 and 2 .", "#### 4")

    def train(name: str, *rows: dict[str, Any]) -> float:
        inputs = {"base": str(artifact("midtrain")), "data": write(tmp_path / f"{name}.jsonl", list(rows))}
        settings = SFTSettings(bin_tokens=64, updates=1, precision="fp32", loss="dft")
        artifact.run("sft", settings, inputs, tmp_path / name)
        return float(read_rows(tmp_path / name / "metrics.jsonl")[0]["loss"])

    def weigh(row: dict[str, Any], weight: float) -> dict[str, Any]:
        return {"messages": [row["messages"][0], {**row["messages"][1], "weight": weight}]}

    alone = train("first", first), train("second", second)
    mixed = train("half", weigh(first, 0.5), second)
    assert mixed == pytest.approx((0.5 * alone[0] + alone[1]) / 1.5, rel=1e-5)
    ignored = {"messages": [*first["messages"], *weigh(second, 0)["messages"]]}
    assert train("ignored", ignored) == pytest.approx(alone[0], rel=1e-5)


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
