"""`polm dpo`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polm.config import find_recipe, load_settings, recipe_folder
from polm.data.readers import write_jsonl
from polm.errors import DataError, ModelError, NonFiniteError, RecipeError, UserError
from polm.models.loading import load_model
from polm.objectives.preference import ANSWER_LOSSES, PAIR_LOSSES, Knobs, build_preference
from polm.recipe import PREFERENCE_KNOBS, AnnotateSettings, DPOSettings
from polm.recipe_data import DataStage, FolderData
from polm.stages import dpo
from polm.stages.common import Context
from polm.tokens import Loss, Scores, TokenBatch

SHIPPED = sorted(path.stem for path in (recipe_folder() / "dpo").glob("*.yaml"))
SMALL = {"bin_tokens": 192, "precision": "fp32", "updates": 2}


def test_a_turn(artifact: Any, check_trained: Any, check_packed: Any, read_rows: Any, read_manifest: Any) -> None:
    folder = artifact("dpo")
    check_trained(folder, artifact("sft"))
    check_packed(folder, 192)
    first, last = (read_rows(folder / "metrics.jsonl")[i] for i in (0, -1))
    # The reference is the base itself: at first no pair has a margin, and the loss is log 2.
    assert first["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert first["dpo/margin"] == pytest.approx(0.0, abs=1e-4)
    assert last["loss"] < first["loss"]
    assert last["dpo/accuracy"] > 0.5
    ledger = read_manifest(folder)["ledger"]
    assert ledger["read"] == read_manifest(artifact("pairs"))["summary"]["pairs"]


def test_both_answers_are_marked(artifact: Any) -> None:
    text = (artifact("dpo") / "example.txt").read_text()
    assert text.count("⟦") == 2
    assert text.count("<|eos|>⟧") >= 1  # an answer that was cut off at its length has no end token of its own


def test_a_reference_as_scores_or_as_a_model_is_the_same(artifact: Any, tmp_path: Path) -> None:
    """And other than the default, in which the base is the reference."""
    inputs = artifact.inputs("dpo")
    settings = artifact.spec("dpo")[1]
    reference = {"model": str(artifact("midtrain")), "data": inputs["data"]}
    annotate = AnnotateSettings(data="preferences", max_tokens=192, precision="fp32")
    artifact.run("annotate", annotate, reference, tmp_path / "scores")
    artifact.run("dpo", settings, {**inputs, "reference": str(tmp_path / "scores")}, tmp_path / "by-scores")
    artifact.run("dpo", settings, {**inputs, "reference": str(artifact("midtrain"))}, tmp_path / "by-model")
    weights = [load_model(folder / "model").state_dict() for folder in (tmp_path / "by-scores", tmp_path / "by-model")]
    for name, p in weights[0].items():
        torch.testing.assert_close(p, weights[1][name], rtol=1e-3, atol=1e-4)
    own = load_model(artifact("dpo") / "model").state_dict()
    assert max(float((p - own[name]).abs().max()) for name, p in weights[0].items()) > 1e-3


def test_a_reference_with_another_tokenizer(artifact: Any, other_model: Path, tmp_path: Path) -> None:
    inputs = {**artifact.inputs("dpo"), "reference": str(other_model)}
    with pytest.raises(ModelError, match="do not have the same tokenizer"):
        artifact.run("dpo", artifact.spec("dpo")[1], inputs, tmp_path / "out")


def test_scores_of_other_data(artifact: Any, tmp_path: Path) -> None:
    inputs = {**artifact.inputs("dpo"), "reference": str(artifact("annotate"))}
    with pytest.raises(UserError, match=r"were made with another data .*run `polm annotate`"):
        artifact.run("dpo", DPOSettings(bin_tokens=192), inputs, tmp_path / "out")


# ---- every loss ------------------------------------------------------------------------------------------------------


def build_feedback(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    write_jsonl(folder / "feedback.jsonl", rows)
    return folder


def judge_prompts(artifact: Any, num: int = 12) -> list[dict[str, Any]]:
    """Judged answers to the prompts of the tiny data set."""
    path = artifact("data") / "prompts.jsonl"
    prompts = [json.loads(raw)["prompt"] for raw in path.read_text().splitlines()]
    return [
        {"prompt": prompts[i % len(prompts)], "completion": f"{i} is {i % 3}", "label": i % 3 == 0} for i in range(num)
    ]


def test_there_is_a_recipe_for_each_loss() -> None:
    losses = {load_settings(DPOSettings, find_recipe(f"dpo/{name}")).loss for name in SHIPPED}
    assert losses == set(PREFERENCE_KNOBS) == {*PAIR_LOSSES, *ANSWER_LOSSES}


def test_the_table_of_methods_is_whole() -> None:
    """docs/methods.md has the command of each recipe of a loss, and each function that computes one."""
    text = (recipe_folder().parent / "docs" / "methods.md").read_text(encoding="utf-8")
    commands = {
        name.strip(" `") for line in text.splitlines() if line.count("|") == 8 for name in line.split("|")[6].split(",")
    }
    assert {f"polm dpo --recipe dpo/{name}" for name in SHIPPED} <= commands
    functions = [spec.compute.__name__ for spec in (*PAIR_LOSSES.values(), *ANSWER_LOSSES.values())]
    assert all(f"`{name}`" in text for name in functions)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(name: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """Two updates on the tiny model, with the file's own loss and knobs; the reference is scored where it is read."""
    words = ["epochs=null", "updates=2", "bin_tokens=192", "bins_per_update=2", "micro_bins=0", "precision=fp32"]
    words += ["optimizer.learning_rate=0.01", "schedule.warmup_updates=0", "checkpoint_every=0"]
    settings = load_settings(DPOSettings, find_recipe(f"dpo/{name}"), words, section="dpo")
    manifest = artifact.run("dpo", settings, artifact.inputs("dpo"), tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0
    reference = settings.loss in ANSWER_LOSSES or PAIR_LOSSES[settings.loss].reference
    assert (tmp_path / "out" / "scores-base").is_dir() == reference
    if reference:  # the base is the reference: no answer has gained anything yet
        assert lines[0]["dpo/chosen_reward"] == pytest.approx(0.0, abs=1e-4)
    assert ("dpo/nll" in lines[0]) == (bool(settings.nll_weight) or settings.loss == "orpo")
    assert ("dpo/anchor" in lines[0]) == (settings.loss in ANSWER_LOSSES)
    before, after = (load_model(folder / "model").state_dict() for folder in (artifact("sft"), tmp_path / "out"))
    assert any(not torch.equal(p, before[n]) for n, p in after.items())
    ledger = manifest["ledger"]
    mismatched = ledger.get("tokens_mismatched", 0)
    assert (mismatched > 0) == (settings.loss == "kto")
    assert ledger["tokens_read"] + mismatched == ledger["tokens_kept"] + ledger.get("tokens_lost", 0)
    assert ledger["tokens_kept"] == ledger["tokens_supervised"] + ledger["tokens_masked"]


def train_on_all_pairs(artifact: Any, folder: Path, **changes: Any) -> None:
    """Every update sees all of the pairs."""
    num_bins = 3 if changes["loss"] == "kto" else 2  # its answers to other prompts take room too
    settings = DPOSettings(**{**SMALL, "updates": 12, "bins_per_update": num_bins, **changes})
    assert artifact.run("dpo", settings, artifact.inputs("dpo"), folder)["ledger"]["bins"] == num_bins


@pytest.mark.parametrize("loss", sorted(set(PREFERENCE_KNOBS) - {"discopop"}))
def test_every_loss_learns(loss: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """On the pairs that it is trained on the loss falls, and chosen answers come out ahead."""
    train_on_all_pairs(artifact, tmp_path / "out", loss=loss, optimizer={"learning_rate": 0.003})
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    gaps = [line["dpo/chosen_reward"] - line["dpo/rejected_reward"] for line in lines]
    assert gaps[-1] > gaps[0]
    assert lines[-1]["dpo/accuracy"] >= 0.7


@pytest.mark.parametrize(("temperature", "sign"), [(0.05, -1.0), (0.2, 1.0)])
def test_discopop_goes_the_way_of_its_slope(
    artifact: Any, read_rows: Any, tmp_path: Path, temperature: float, sign: float
) -> None:
    """At equal scores its loss rises with the margin for temperatures below 0.102, as for the paper's 0.05: small
    steps then lead to a minimum on the wrong side."""
    changes = {"discopop_temperature": temperature, "optimizer": {"learning_rate": 0.0003}}
    train_on_all_pairs(artifact, tmp_path / "out", loss="discopop", **changes)
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sign * lines[-1]["dpo/margin"] > 0.05


@pytest.mark.parametrize("loss", sorted(ANSWER_LOSSES))
def test_judged_answers(loss: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """Desirable answers become likelier, undesirable ones less so."""
    data = build_feedback(tmp_path, judge_prompts(artifact))
    settings = DPOSettings(**{**SMALL, "updates": 12}, loss=loss, optimizer={"learning_rate": 0.003})
    inputs = {"base": str(artifact("sft")), "data": str(data)}
    manifest = artifact.run("dpo", settings, inputs, tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.5 if loss == "kto" else math.log(2.0), abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["dpo/chosen_reward"] > lines[-1]["dpo/rejected_reward"]
    assert manifest["ledger"]["read"] == 12
    # The same file by its own path.
    again = {**inputs, "data": str(data / "feedback.jsonl")}
    artifact.run("dpo", settings.model_copy(update={"updates": 1}), again, tmp_path / "again")
    assert read_rows(tmp_path / "again" / "metrics.jsonl")[0]["loss"] == lines[0]["loss"]


@pytest.mark.parametrize("loss", ["kto", "bco", "simpo", "orpo"])
def test_a_stopped_run_goes_on_to_the_same_bits(loss: str, artifact: Any, hash_files: Any, tmp_path: Path) -> None:
    """The anchors of KTO and BCO are functions of the batch: there is no state beside the weights to lose."""
    settings = DPOSettings(**{**SMALL, "updates": 5}, loss=loss, checkpoint_every=2, optimizer={"learning_rate": 0.003})
    inputs = artifact.inputs("dpo")
    quiet = {"inputs": inputs, "say": lambda _: None}

    def stop(line: Mapping[str, Any]) -> None:
        if line["update"] == 3 and "loss" in line:
            raise InterruptedError

    dpo.run(settings, Context(tmp_path / "whole", **quiet))
    with pytest.raises(InterruptedError):
        dpo.run(settings, Context(tmp_path / "parts", report=stop, **quiet))
    seen: list[int] = []
    context = Context(tmp_path / "parts", report=lambda line: seen.append(line["update"]), **quiet)
    dpo.run(settings, context)
    assert seen[0] == 3  # from the checkpoint of update 2, the reference's scores read back
    assert hash_files(tmp_path / "parts") == hash_files(tmp_path / "whole")


# ---- what cannot be right --------------------------------------------------------------------------------------------


def run_refused(
    artifact: Any, folder: Path, data: Path | str, error: type[Exception], match: str, **changes: Any
) -> None:
    inputs = {"base": str(artifact("sft")), "data": str(data), **changes.pop("inputs", {})}
    with pytest.raises(error, match=match):
        artifact.run("dpo", DPOSettings(**{**SMALL, **changes}), inputs, folder / "out")


def test_a_reference_that_nobody_reads(artifact: Any, tmp_path: Path) -> None:
    more = {"reference": str(artifact("midtrain"))}
    run_refused(
        artifact, tmp_path, artifact("pairs"), RecipeError, "simpo reads no reference", loss="simpo", inputs=more
    )


def test_scores_of_pairs_for_kto(artifact: Any, tmp_path: Path) -> None:
    more = {"reference": str(artifact("annotate"))}
    match = "loss: kto needs those of other answers too: give the reference model itself"
    run_refused(artifact, tmp_path, artifact("pairs"), RecipeError, match, loss="kto", inputs=more)


@pytest.mark.parametrize("label", [True, False])
def test_one_label_only(artifact: Any, tmp_path: Path, label: bool) -> None:
    data = build_feedback(tmp_path, [{**row, "label": label} for row in judge_prompts(artifact, 4)])
    counts = "4 answers labelled true and 0" if label else "0 answers labelled true and 4"
    run_refused(artifact, tmp_path, data, DataError, f"feedback: {counts} .*need both labels", loss="bco")


def test_one_prompt_only(artifact: Any, tmp_path: Path) -> None:
    rows = judge_prompts(artifact, 4)
    data = build_feedback(tmp_path, [{**row, "prompt": rows[0]["prompt"]} for row in rows])
    run_refused(artifact, tmp_path, data, DataError, "all of the data has one prompt", loss="kto")


def test_judged_answers_for_a_loss_of_pairs(artifact: Any, tmp_path: Path) -> None:
    data = build_feedback(tmp_path, judge_prompts(artifact, 4)) / "feedback.jsonl"
    run_refused(artifact, tmp_path, data, DataError, "no column chosen, rejected; found prompt, completion, label")


def test_only_equal_answers(artifact: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "preferences.jsonl", [{"prompt": "2 + 2 =", "chosen": "4", "rejected": "4"}])
    run_refused(artifact, tmp_path, tmp_path, DataError, r"no token is supervised \(1 examples read, 1 dropped\)")


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "2 + 2 =",
            "chosen": [{"role": "user", "content": "3 + 3 ="}, {"role": "assistant", "content": "6"}],
            "rejected": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "5"}],
        },
        {
            "chosen": [{"role": "user", "content": "3 + 3 ="}, {"role": "assistant", "content": "6"}],
            "rejected": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "5"}],
        },
    ],
)
def test_prompts_of_a_pair_that_differ(artifact: Any, tmp_path: Path, row: dict[str, Any]) -> None:
    write_jsonl(tmp_path / "preferences.jsonl", [row])
    match = r"preferences.jsonl:1: chosen must end in exactly one assistant message after the common prompt"
    run_refused(artifact, tmp_path, tmp_path, DataError, match)


def test_scores_that_are_no_numbers(artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reference before training; of the policy at the update in which they come up."""
    annotate = dpo.cached_annotation

    def spoil(*given: Any) -> Any:
        annotation = annotate(*given)
        annotation.logprobs[-1] = math.nan
        return annotation

    monkeypatch.setattr(dpo, "cached_annotation", spoil)
    match = r"1 of \d+ log-probabilities of the reference \(.*\) are no finite numbers"
    run_refused(artifact, tmp_path, artifact("pairs"), DataError, match)
    plain = build_preference("simpo", Knobs())

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        return plain.compute(Scores(scores.logprobs_N * math.nan), batch)

    monkeypatch.setattr(dpo, "build_preference", lambda *_: replace(plain, compute=compute))
    match = "update 0: the loss is nan"
    run_refused(artifact, tmp_path / "policy", artifact("pairs"), NonFiniteError, match, loss="simpo")


def test_judged_answers_go_into_a_data_set(artifact: Any, tmp_path: Path) -> None:
    """`polm data` checks them line by line; the copy is what `polm dpo loss=kto` then reads."""
    build_feedback(tmp_path, judge_prompts(artifact, 4))
    settings = DataStage(data=FolderData(source="folder", path=tmp_path))
    assert artifact.run("data", settings, {}, tmp_path / "out")["summary"] == {"records/feedback.jsonl": 4}
    assert (tmp_path / "out" / "feedback.jsonl").read_bytes() == (tmp_path / "feedback.jsonl").read_bytes()
    build_feedback(tmp_path, [{**row, "label": "yes"} for row in judge_prompts(artifact, 4)])
    with pytest.raises(DataError, match=r"feedback.jsonl:1: label must be true or false, found 'yes'"):
        artifact.run("data", settings, {}, tmp_path / "again")
