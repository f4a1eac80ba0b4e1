"""Records that happen in real data and cannot be learned from: named, or left out and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polm.data.readers import write_jsonl
from polm.errors import DataError, ModelError
from polm.models.loading import load_model, load_tokenizer, save_model
from polm.recipe import (
    AnnotateSettings,
    DPOSettings,
    ProcessRewardModelSettings,
    RewardModelSettings,
    SFTSettings,
)
from polm.recipe_data import DataStage, FilesData, FolderData, MixedSource

SMALL: dict[str, Any] = {"bin_tokens": 192, "precision": "fp32", "updates": 1}
GOOD = [{"prompt": f"add {i} and 1 .", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(6)]
EQUAL = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "4"}
DIFFER = {
    "chosen": [{"role": "user", "content": "3 + 3 ="}, {"role": "assistant", "content": "6"}],
    "rejected": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "5"}],
}
EMPTY = {"prompt": "2 + 2 =", "chosen": "4", "rejected": ""}
# Without a token for the end of a turn, nothing is left of an empty answer.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} . {% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def bare(artifact: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose template ends no turn."""
    folder: Path = tmp_path_factory.mktemp("bare") / "model"
    tokenizer = load_tokenizer(artifact("sft") / "model")
    tokenizer.chat_template = BARE
    save_model(load_model(artifact("sft") / "model"), tokenizer, folder)
    return str(folder)


def write_pairs(folder: Path, *more: dict[str, Any]) -> str:
    write_jsonl(folder / "preferences.jsonl", [*GOOD[:3], *more, *GOOD[3:]])
    return str(folder)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("dpo", DPOSettings(**SMALL)),
        ("dpo", DPOSettings(**SMALL, loss="kto")),
        ("reward_model", RewardModelSettings(**SMALL, holdout_share=0.0)),
    ],
)
def test_pairs_whose_prompts_differ(stage: str, settings: Any, artifact: Any, tmp_path: Path) -> None:
    inputs = {"base": str(artifact("sft")), "data": write_pairs(tmp_path, EQUAL, DIFFER)}
    with pytest.raises(DataError, match=r"preferences.jsonl:5: chosen must end in .* set bad_records: drop, which"):
        artifact.run(stage, settings, inputs, tmp_path / "refused")
    dropping = settings.model_copy(update={"bad_records": "drop"})
    ledger = artifact.run(stage, dropping, inputs, tmp_path / "out")["ledger"]
    counts = {name: n for name, n in ledger.items() if name.startswith("dropped") or name in ("read", "kept")}
    assert counts == {"read": 8, "kept": 6, "dropped": 2, "dropped_equal": 1, "dropped_prompts_differ": 1}
    assert ledger["tokens_read"] == ledger["tokens_kept"] - ledger.get("tokens_mismatched", 0) + ledger["tokens_lost"]


def test_the_data_stage_counts_them_and_lets_the_trainer_decide(artifact: Any, tmp_path: Path) -> None:
    folder, out = Path(write_pairs(tmp_path, DIFFER)), tmp_path / "out"
    copied = artifact.run("data", DataStage(data=FolderData(source="folder", path=folder)), {}, out / "copied")
    assert copied["ledger"] == {"records": 6, "pairs_prompts_differ": 1}
    inputs = {"base": str(artifact("sft")), "data": str(out / "copied")}
    with pytest.raises(DataError, match=r"preferences.jsonl:4: chosen must end in"):
        artifact.run("dpo", DPOSettings(**SMALL), inputs, out / "refused")

    source = (MixedSource(path=str(folder / "preferences.jsonl")),)
    files = FilesData(source="files", preferences=source)
    with pytest.raises(DataError, match=r"data.preferences: .*preferences.jsonl:4: .* set data.bad_records=drop"):
        artifact.run("data", DataStage(data=files), {}, out / "refused_files")
    dropping = DataStage(data=files.model_copy(update={"bad_records": "drop"}))
    ledger = artifact.run("data", dropping, {}, out / "files")["ledger"]
    assert ledger["preferences/read"] == 7
    assert ledger["preferences/kept"] == 6
    assert ledger["preferences/dropped_prompts_differ"] == 1


@pytest.mark.parametrize(
    ("stage", "settings"),
    [("dpo", DPOSettings(**SMALL)), ("reward_model", RewardModelSettings(**SMALL, holdout_share=0.0))],
)
def test_an_answer_of_which_the_template_leaves_nothing(
    stage: str, settings: Any, artifact: Any, bare: str, tmp_path: Path
) -> None:
    inputs = {"base": bare, "data": write_pairs(tmp_path, EMPTY)}
    with pytest.raises(DataError, match=r"pair 3: none of the .* tokens of the conversation is the assistant's.*drop"):
        artifact.run(stage, settings, inputs, tmp_path / "refused")
    dropping = settings.model_copy(update={"bad_records": "drop"})
    ledger = artifact.run(stage, dropping, inputs, tmp_path / "out")["ledger"]
    assert (ledger["read"], ledger["kept"], ledger["dropped"], ledger["dropped_empty"]) == (7, 6, 1, 1)


def test_judged_answers_and_conversations(artifact: Any, bare: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"add {i} .", "completion": str(i), "label": i % 2 == 0} for i in range(6)]
    write_jsonl(tmp_path / "feedback.jsonl", [*rows, {"prompt": "add 7 .", "completion": "", "label": True}])
    dpo = DPOSettings(**SMALL, loss="bco", bad_records="drop")
    ledger = artifact.run("dpo", dpo, {"base": bare, "data": str(tmp_path)}, tmp_path / "bco")["ledger"]
    assert (ledger["read"], ledger["kept"], ledger["dropped_empty"]) == (7, 6, 1)

    turns = [[{"role": "user", "content": "add"}, {"role": "assistant", "content": said}] for said in ("1", "2", "")]
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": messages} for messages in turns])
    inputs = {"base": bare, "data": str(tmp_path)}
    with pytest.raises(DataError, match=r"conversation 2: none of the .* set bad_records: drop"):
        artifact.run("sft", SFTSettings(**SMALL), inputs, tmp_path / "refused")
    ledger = artifact.run("sft", SFTSettings(**SMALL, bad_records="drop"), inputs, tmp_path / "sft")["ledger"]
    assert (ledger["read"], ledger["kept"], ledger["dropped_empty"]) == (3, 2, 1)


MEDIA: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sft.jsonl": ("sft", SFTSettings(**SMALL), {"prompt": "add 1 .", "completion": "1"}),
    "feedback.jsonl": (
        "dpo",
        DPOSettings(**SMALL, loss="bco"),
        {"prompt": "add 1 .", "completion": "1", "label": True},
    ),
    "stepwise.jsonl": (
        "process_reward_model",
        ProcessRewardModelSettings(**SMALL, separator=";", holdout_share=0.0),
        {"prompt": "add 1 .", "completions": ["1", "2"], "labels": [1, 0]},
    ),
}


@pytest.mark.parametrize("name", MEDIA)
def test_records_that_refer_to_media(name: str, artifact: Any, tmp_path: Path) -> None:
    """A folder is copied with them, counted; the stage that learns from it refuses them, or leaves them out."""
    stage, settings, row = MEDIA[name]
    second = {**row, "label": False} if "label" in row else row
    write_jsonl(tmp_path / "mine" / name, [row, {**row, "image": "a.png"}, second])
    data = DataStage(data=FolderData(source="folder", path=tmp_path / "mine"))
    copied = artifact.run("data", data, {}, tmp_path / "copied")["ledger"]
    assert copied.pop("records") == 2
    assert list(copied.values()) == [1]
    assert next(iter(copied)).endswith("_media")
    inputs = {"base": str(artifact("sft")), "data": str(tmp_path / "copied")}
    with pytest.raises(DataError, match=rf"{name}:2: the record refers to image: a.png.* set bad_records: drop"):
        artifact.run(stage, settings, inputs, tmp_path / "refused")
    dropping = settings.model_copy(update={"bad_records": "drop"})
    ledger = artifact.run(stage, dropping, inputs, tmp_path / "out")["ledger"]
    assert (ledger["read"], ledger["kept"], ledger["dropped"], ledger["dropped_media"]) == (3, 2, 1, 1)


def test_a_reference_scored_beforehand_leaves_out_the_same(artifact: Any, tmp_path: Path) -> None:
    data = write_pairs(tmp_path, DIFFER)
    annotate = AnnotateSettings(data="preferences", max_tokens=192, too_long="error", precision="fp32")
    model = {"model": str(artifact("sft")), "data": data}
    artifact.run("annotate", annotate.model_copy(update={"bad_records": "drop"}), model, tmp_path / "scores")
    inputs = {"base": str(artifact("sft")), "data": data, "reference": str(tmp_path / "scores")}
    ledger = artifact.run("dpo", DPOSettings(**SMALL, bad_records="drop"), inputs, tmp_path / "out")["ledger"]
    assert ledger["dropped_prompts_differ"] == 1


def test_a_template_that_cannot_mark_the_assistants_tokens(artifact: Any, tmp_path: Path) -> None:
    """It changes earlier turns, so that no prefix of the text is the prompt: no record could be used."""
    tokenizer = load_tokenizer(artifact("sft") / "model")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %} {{ m.content }}{% endfor %}"
    save_model(load_model(artifact("sft") / "model"), tokenizer, tmp_path / "model")
    write_jsonl(
        tmp_path / "sft.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}]}],
    )
    inputs = {"base": str(tmp_path / "model"), "data": str(tmp_path)}
    with pytest.raises(ModelError, match=r"conversation 0: .*template.*Cure"):
        artifact.run("sft", SFTSettings(**SMALL, bad_records="drop"), inputs, tmp_path / "out")


# Of earlier answers it keeps what stands behind a semicolon, as templates of reasoning models do with the reasoning.
FORGETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}{{ '<|assistant|>' +"
    " (m.content if loop.last else m.content.split(';')[-1]) + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_a_conversation_that_the_template_cannot_mark(artifact: Any, tmp_path: Path) -> None:
    """Its first answer is rendered differently once the second one is there; those of the others are not."""
    tokenizer = load_tokenizer(artifact("sft") / "model")
    tokenizer.chat_template = FORGETS
    save_model(load_model(artifact("sft") / "model"), tokenizer, tmp_path / "model")
    ask, again = {"role": "user", "content": "add 1 and 2 ."}, {"role": "user", "content": "add 2 and 2 ."}
    talks = [
        [ask, {"role": "assistant", "content": text}, again, {"role": "assistant", "content": "4"}] for text in "123"
    ]
    talks[1][1] = {"role": "assistant", "content": "1 ; 3"}
    inputs = {"base": str(tmp_path / "model"), "data": str(tmp_path)}
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": messages} for messages in talks])
    with pytest.raises(DataError, match=r"conversation 1: .*not prefix-preserving: message 1 .* set bad_records: drop"):
        artifact.run("sft", SFTSettings(**SMALL), inputs, tmp_path / "refused")
    dropping = SFTSettings(**SMALL, bad_records="drop")
    ledger = artifact.run("sft", dropping, inputs, tmp_path / "sft")["ledger"]
    assert (ledger["read"], ledger["kept"], ledger["dropped_unmarkable"]) == (3, 2, 1)
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": talks[1]}])
    with pytest.raises(DataError, match=r"no token is supervised \(1 examples read, 1 dropped\).* the chat template"):
        artifact.run("sft", dropping, inputs, tmp_path / "nothing")


def test_pairs_that_the_template_cannot_mark(artifact: Any, tmp_path: Path) -> None:
    """A template that begins each answer for the model: one that does not begin so would be prompted otherwise."""
    tokenizer = load_tokenizer(artifact("sft") / "model")
    begun = FORGETS.replace("{{ '<|assistant|>' }}{% endif %}", "{{ '<|assistant|><think>' }}{% endif %}")
    tokenizer.chat_template = begun
    save_model(load_model(artifact("sft") / "model"), tokenizer, tmp_path / "model")
    rows = [{**row, "chosen": f"<think> {row['chosen']}", "rejected": f"<think> {row['rejected']}"} for row in GOOD]
    write_jsonl(tmp_path / "preferences.jsonl", [*rows, GOOD[0]])
    inputs = {"base": str(tmp_path / "model"), "data": str(tmp_path)}
    with pytest.raises(DataError, match=r"pair 6: .*once its answer is there.* set bad_records: drop"):
        artifact.run("dpo", DPOSettings(**SMALL), inputs, tmp_path / "refused")
    ledger = artifact.run("dpo", DPOSettings(**SMALL, bad_records="drop"), inputs, tmp_path / "out")["ledger"]
    assert (ledger["read"], ledger["dropped_unmarkable"]) == (7, 1)
