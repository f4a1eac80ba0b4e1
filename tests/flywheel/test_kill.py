"""kill -9 at every moment of a stage: running it again gives the same bits as a run that was left alone."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from polm.flywheel.store import external_key, is_finished
from polm.stages.table import STAGES

CLOCK = ("seconds", "tokens_per_second", "eta_seconds")

# (artifact, checkpoint_every, (moment, number)); pretrain has 12 updates, remit 6, sft 6, dpo 2, grpo 4 in 2 rollouts.
KILLS: list[tuple[str, int, tuple[str, int]]] = [
    ("pretrain", 3, ("in the claim", 1)),
    ("pretrain", 3, ("in a line of the log", 2)),  # before the first checkpoint
    ("pretrain", 3, ("in a line of the log", 8)),
    ("pretrain", 3, ("in a file of a checkpoint", 1)),
    ("pretrain", 3, ("in a file of a checkpoint", 4)),
    ("pretrain", 3, ("before a checkpoint's rename", 1)),
    ("pretrain", 3, ("before a checkpoint's rename", 2)),
    ("pretrain", 3, ("before the older checkpoint goes", 3)),
    ("pretrain", 3, ("before the model's rename", 1)),
    ("pretrain", 3, ("before the checkpoints go", 1)),
    ("pretrain", 3, ("after the checkpoints went", 1)),
    ("pretrain", 3, ("before the manifest", 1)),
    ("remit", 2, ("in a line of the log", 4)),
    ("shuffled", 1, ("in a line of the log", 5)),
    ("rho1", 2, ("in the scores of the reference", 1)),  # of the frozen base
    ("rho1", 2, ("in a line of the log", 6)),  # the frozen base is not the checkpoint
    ("distill", 2, ("in a line of the log", 5)),
    ("sft", 2, ("in a line of the log", 4)),
    ("dpo", 1, ("in the scores of the reference", 1)),
    ("dpo", 1, ("in a line of the log", 2)),
    # Lines of samples.jsonl count too: 4 samples, 1, 2, 4 samples, 3, 4.
    ("grpo", 1, ("in a line of the log", 1)),
    ("grpo", 1, ("in a line of the log", 6)),
    ("grpo", 1, ("in a line of the log", 8)),
    ("grpo", 1, ("in a line of the log", 12)),  # within a rollout: it goes on from the rollout's start
    ("grpo", 1, ("before the checkpoints go", 1)),
    ("rloo", 1, ("in a line of the log", 8)),  # after the first of two rollouts
    # Two rollouts of four updates: 4 lines of samples, 4 updates, 4 samples, 4 updates; a checkpoint after update 4.
    ("ppo", 1, ("in a line of the log", 7)),
    ("ppo", 1, ("in a line of the log", 15)),
    ("ppo", 1, ("before the model's rename", 2)),  # the policy is saved, the critic is not
    ("remax", 1, ("in a line of the log", 6)),
    ("pairs", 0, ("before the manifest", 1)),
    ("annotate", 0, ("in the scores of the reference", 1)),
    ("eval", 0, ("before the manifest", 1)),
    ("data", 0, ("before the manifest", 1)),
    ("tokenizer", 0, ("before the manifest", 1)),
]


def order_of(artifact: Any, name: str, every: int, out: Path, inputs: dict[str, str] | None = None) -> tuple[Any, ...]:
    """The arguments of the runner's `run_node` that make an artifact."""
    stage, settings, _ = artifact.spec(name)
    given = inputs or artifact.inputs(name)
    keys = {role: external_key(source) for role, source in given.items()}
    if every:
        settings = settings.model_copy(update={"checkpoint_every": every})
    return stage, settings.model_dump(mode="json"), given, keys, str(out)


def content(folder: Path, hash_files: Any) -> dict[str, Any]:
    """All that must be equal: tensors to the bit, the log but for its clock, the numbers of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found: dict[str, Any] = {
        "tensors": hash_files(folder),
        "key": manifest["key"],
        "ledger": manifest["ledger"],
        "summary": {k: v for k, v in manifest["summary"].items() if k.removeprefix("last/") not in CLOCK},
        "files": sorted(set(manifest["files"]) - {"log.txt"}),
    }
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(raw) for raw in path.read_text().splitlines()]
        found[path.name] = [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
    return found


@pytest.mark.parametrize(("name", "every", "moment"), KILLS, ids=lambda x: x if isinstance(x, str) else None)
def test_a_killed_stage_goes_on_to_the_same_bits(
    artifact: Any, hash_files: Any, start_child: Any, tmp_path: Path, name: str, every: int, moment: tuple[str, int]
) -> None:
    expected = content(artifact(name), hash_files)
    order = order_of(artifact, name, every, tmp_path / "out")
    child = start_child(stage=order, die=moment)
    child.join(120)
    assert child.exitcode == -9
    assert not is_finished(tmp_path / "out")
    again = start_child(stage=order)
    again.join(120)
    assert again.exitcode == 0
    assert content(tmp_path / "out", hash_files) == expected
    assert not list((tmp_path / "out").glob("*checkpoint*"))
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_reference_model_is_scored_again_after_a_kill(
    artifact: Any, hash_files: Any, start_child: Any, tmp_path: Path
) -> None:
    """The reference given as a model: its half-written scores are not taken for whole ones."""
    inputs = {**artifact.inputs("midtrain"), "reference": str(artifact("grpo"))}
    stage, settings, _ = artifact.spec("remit")
    artifact.run(stage, settings, inputs, tmp_path / "whole")
    order = order_of(artifact, "remit", 2, tmp_path / "out", inputs)
    for moment in (("in the scores of the reference", 1), ("in a line of the log", 3), ("in a line of the log", 3)):
        child = start_child(stage=order, die=moment)
        child.join(120)
        assert child.exitcode == -9
    again = start_child(stage=order)
    again.join(120)
    assert content(tmp_path / "out", hash_files) == content(tmp_path / "whole", hash_files)


@pytest.mark.parametrize("name", ["pretrain", "grpo"])
def test_kills_at_any_time(artifact: Any, hash_files: Any, start_child: Any, tmp_path: Path, name: str) -> None:
    """By the clock, again and again, each time a little later, until it gets to its end."""
    expected = content(artifact(name), hash_files)
    order = order_of(artifact, name, 1, tmp_path / "out")
    num_killed = 0
    for attempt in range(60):
        child = start_child(stage=order)
        child.join(0.02 * 1.15**attempt)
        if child.exitcode is None:
            child.kill()
            child.join()
            num_killed += 1
        if is_finished(tmp_path / "out"):
            break
    assert num_killed >= 1
    again = start_child(stage=order)
    again.join(120)
    assert content(tmp_path / "out", hash_files) == expected


def test_the_checkpoints_are_of_use(artifact: Any, start_child: Any, tmp_path: Path) -> None:
    """Killed in update 11 of 12 with a checkpoint at 9: the rest takes three updates, not twelve."""
    order = order_of(artifact, "pretrain", 3, tmp_path / "out")
    child = start_child(stage=order, die=("in a line of the log", 11))
    child.join(120)
    assert child.exitcode == -9
    seen: list[int] = []
    settings = artifact.spec("pretrain")[1].model_copy(update={"checkpoint_every": 3})
    from polm.flywheel.store import Work, execute
    from polm.stages.common import Context

    work = Work(STAGES["pretrain"], settings, order[2], order[3], tmp_path / "out")
    report = lambda line: seen.append(line["update"])  # noqa: E731
    execute(work, Context(tmp_path / "out", order[2], report=report, say=lambda _: None))
    assert seen == [10, 11, 12]


def test_the_seconds_before_a_kill_count(artifact: Any, start_child: Any, tmp_path: Path) -> None:
    order = order_of(artifact, "pretrain", 3, tmp_path / "out")
    child = start_child(stage=order, die=("in a line of the log", 5))
    child.join(120)
    assert child.exitcode == -9
    note = tmp_path / "out" / ".seconds"
    assert float(note.read_text()) > 0
    note.write_text("1000.0\n")  # as if it had taken long
    again = start_child(stage=order)
    again.join(120)
    assert 1000 < json.loads((tmp_path / "out" / "manifest.json").read_text())["seconds"] < 1120
    assert not note.exists()


def test_what_a_kill_left_is_not_mixed_with_other_settings(artifact: Any, start_child: Any, tmp_path: Path) -> None:
    from polm.errors import StoreError

    order = order_of(artifact, "sft", 2, tmp_path / "out")
    child = start_child(stage=order, die=("in a line of the log", 4))
    child.join(120)
    stage, settings, _ = artifact.spec("sft")
    with pytest.raises(StoreError, match="holds an unfinished artifact of other settings"):
        artifact.run(stage, settings.model_copy(update={"seed": 9}), artifact.inputs("sft"), tmp_path / "out")
    # Another cadence is no other artifact: it goes on.
    artifact.run(stage, settings.model_copy(update={"checkpoint_every": 5}), artifact.inputs("sft"), tmp_path / "out")


def test_two_at_once(artifact: Any, start_child: Any, tmp_path: Path) -> None:
    """A second run of the same artifact says who has it, and the first is not disturbed."""
    import re

    from polm.errors import StoreError

    stage, settings, _ = artifact.spec("pretrain")
    settings = settings.model_copy(update={"updates": 4000})
    inputs = artifact.inputs("pretrain")
    keys = {role: external_key(source) for role, source in inputs.items()}
    child = start_child(stage=(stage, settings.model_dump(mode="json"), inputs, keys, str(tmp_path / "out")))
    log = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(StoreError, match=re.escape(f"in use by process {child.pid};")):
        artifact.run(stage, settings, inputs, tmp_path / "out")
    assert child.exitcode is None
    size = log.stat().st_size
    while log.stat().st_size == size and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.stat().st_size > size
    child.kill()
    child.join()
    shutil.rmtree(tmp_path / "out")
