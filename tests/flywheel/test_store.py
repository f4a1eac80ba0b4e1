"""Keys, manifests, locks, and folders that are not what they should be."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polm.data.fingerprint import fingerprint_bytes
from polm.errors import DataError, StoreError
from polm.flywheel import store
from polm.flywheel.store import (
    Work,
    check_artifact,
    compute_key,
    execute,
    external_key,
    is_finished,
    lock,
    read_manifest,
)
from polm.recipe import MidtrainSettings, SFTSettings, TokenizerSettings
from polm.recipe_data import DataStage, FolderData
from polm.stages.common import Context, Stage, StageResult
from polm.stages.table import STAGES

# ---- keys ----------------------------------------------------------------------------------------------------------


def sft_key(inputs: dict[str, str] | None = None, version: int = 1, **changes: Any) -> str:
    import dataclasses

    stage = dataclasses.replace(STAGES["sft"], version=version)
    return compute_key(stage, SFTSettings(**changes), inputs or {"base": "b", "data": "d"})


def test_what_a_key_depends_on() -> None:
    key = sft_key()
    assert len(key) == 64
    assert key == sft_key() == sft_key(checkpoint_every=5, log_every=2) == sft_key({"data": "d", "base": "b"})
    different = [
        sft_key(epochs=2),
        sft_key(seed=1),
        sft_key(threads=2),
        sft_key(precision="bf16"),
        sft_key(optimizer={"learning_rate": 1e-3}),
        sft_key({"base": "b2", "data": "d"}),
        sft_key({"base": "b", "data": "d", "reference": "r"}),
        sft_key({"base": "d", "data": "b"}),
        sft_key(version=2),
        compute_key(STAGES["midtrain"], MidtrainSettings(), {"base": "b", "data": "d"}),
    ]
    assert len({key, *different}) == 1 + len(different)


def test_data_of_ones_own_goes_in_by_content(tmp_path: Path) -> None:
    def key(path: Path) -> str:
        return compute_key(STAGES["data"], DataStage(data=FolderData(source="folder", path=path)), {})

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sft.jsonl").write_text("{}\n")
    assert key(tmp_path / "a") == key(tmp_path / "b")
    (tmp_path / "b" / "sft.jsonl").write_text("{} \n")
    assert key(tmp_path / "a") != key(tmp_path / "b")
    assert key(tmp_path / "nowhere") != key(tmp_path / "elsewhere")  # a dry run needs no data


def test_keys_of_inputs_from_outside(tmp_path: Path, artifact: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}\n")
    before = external_key(str(file))
    file.write_text("{ }\n")
    assert external_key(str(file)) != before
    folder = artifact("tokenizer")
    assert external_key(str(folder)) == read_manifest(folder)["key"]
    assert external_key("somebody/model") == "hub:somebody/model"
    assert external_key(str(folder / "model")) not in ("", read_manifest(folder)["key"])


# ---- a stage made for the tests ------------------------------------------------------------------------------------

Run = Callable[[Any, Context], StageResult]


def build_work(folder: Path, run: Run, *, settings: Any = None) -> Work:
    stage = Stage("tokenizer", "produce", TokenizerSettings, run, inputs=())
    return Work(stage, settings or TokenizerSettings(), {}, {}, folder)


def write_file(settings: Any, context: Context) -> StageResult:
    del settings
    (context.workdir / "sub").mkdir(exist_ok=True)
    (context.workdir / "sub" / "a.txt").write_text("hello")
    return StageResult({"x": 1.5}, {"rows": 3})


def go(work: Work) -> dict[str, Any]:
    return execute(work, Context(work.folder, {}))


def test_a_manifest(tmp_path: Path) -> None:
    work = build_work(tmp_path / "out", write_file)
    manifest = go(work)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["key"] == work.key
    assert (manifest["stage"], manifest["version"]) == ("tokenizer", 1)
    assert manifest["files"] == {
        "sub/a.txt": {"bytes": 5, "sha256": fingerprint_bytes(tmp_path / "out" / "sub" / "a.txt")}
    }
    assert manifest["config"]["vocab_size"] == 8192
    assert (manifest["summary"], manifest["ledger"]) == ({"x": 1.5}, {"rows": 3})
    assert manifest["started"] <= manifest["finished"]
    assert manifest["peak_rss_mb"] > 50


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def run(settings: Any, context: Context) -> StageResult:
        calls.append(1)
        return write_file(settings, context)

    first, second = (go(build_work(tmp_path / "out", run)) for _ in range(2))
    assert first == second
    assert calls == [1]


def test_a_failed_stage_goes_on_in_its_folder(tmp_path: Path) -> None:
    def fail(settings: Any, context: Context) -> StageResult:
        write_file(settings, context)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        go(build_work(tmp_path / "out", fail))
    assert not is_finished(tmp_path / "out")

    def check(settings: Any, context: Context) -> StageResult:
        assert (context.workdir / "sub" / "a.txt").read_text() == "hello"
        return write_file(settings, context)

    go(build_work(tmp_path / "out", check))
    assert is_finished(tmp_path / "out")


def test_seconds_are_those_of_all_attempts(tmp_path: Path) -> None:
    """A failed attempt notes its time; what lies between attempts is not counted."""
    note = tmp_path / "out" / ".seconds"

    def fail(settings: Any, context: Context) -> StageResult:
        write_file(settings, context)
        time.sleep(0.1)
        raise RuntimeError("boom")

    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match="boom"):
            go(build_work(tmp_path / "out", fail))
        assert 0.1 * attempt <= float(note.read_text()) < 0.1 * attempt + 60
    note.write_text("1000.0\n")
    manifest = go(build_work(tmp_path / "out", write_file))
    assert 1000 <= manifest["seconds"] < 1060
    assert not note.exists()
    assert sorted(manifest["files"]) == ["sub/a.txt"]


def test_a_kill_leaves_the_seconds_that_progress_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process notes nothing more; at most every NOTE_SECONDS does the progress before it."""
    now = 7.0
    monkeypatch.setattr(store, "time", SimpleNamespace(perf_counter=lambda: now))
    note = tmp_path / "out" / ".seconds"
    seen: list[float] = []
    told: list[Any] = []

    def run(settings: Any, context: Context) -> StageResult:
        nonlocal now
        for update in range(3):
            now += 0.6 * store.NOTE_SECONDS
            context.report({"update": update})
            seen.append(float(note.read_text()) / store.NOTE_SECONDS)
        return write_file(settings, context)

    work = build_work(tmp_path / "out", run)
    manifest = execute(work, Context(work.folder, {}, report=told.append))
    assert told == [{"update": update} for update in range(3)]
    assert seen == pytest.approx([0.6, 0.6, 1.8])
    assert manifest["seconds"] == pytest.approx(1.8 * store.NOTE_SECONDS)


@pytest.mark.parametrize("content", ["", "who knows\n"])
def test_a_note_that_cannot_be_read_is_no_note(tmp_path: Path, content: str) -> None:
    work = build_work(tmp_path / "out", write_file)
    work.folder.mkdir()
    (work.folder / ".key").write_text(work.key)
    (work.folder / ".seconds").write_text(content)
    assert go(work)["seconds"] < 60


def test_a_mistake_in_the_inputs_leaves_nothing_behind(tmp_path: Path) -> None:
    """Corrected inputs make another key; the folder of the first try must not stand in the way."""

    def refuse(_: Any, context: Context) -> StageResult:
        context.report({"update": 0})
        raise DataError("no such file")

    with pytest.raises(DataError):
        go(build_work(tmp_path / "out", refuse))
    assert not (tmp_path / "out").exists()
    go(build_work(tmp_path / "out", write_file, settings=TokenizerSettings(vocab_size=10)))


def test_leftovers_of_another_key_are_refused(tmp_path: Path) -> None:
    """Refused once there is a checkpoint to lose; before that they must not stand in the way of the cure."""

    def fail(settings: Any, context: Context) -> StageResult:
        write_file(settings, context)
        raise DataError("later")

    def fail_late(settings: Any, context: Context) -> StageResult:
        (context.workdir / "checkpoint-00000002").mkdir()
        (context.workdir / "checkpoint-00000002" / "progress.json").write_text("{}")
        return fail(settings, context)

    out = tmp_path / "out"
    with pytest.raises(DataError):
        go(build_work(out, fail))
    with pytest.raises(DataError):
        go(build_work(out, fail_late, settings=TokenizerSettings(vocab_size=10)))
    with pytest.raises(StoreError, match=r"holds an unfinished artifact of other settings, with a checkpoint; remove"):
        go(build_work(out, write_file))
    shutil.rmtree(out)
    go(build_work(out, write_file))
    other = build_work(out, write_file, settings=TokenizerSettings(vocab_size=10))
    with pytest.raises(StoreError, match=r"holds another artifact \(key .*give another out=FOLDER, or remove this one"):
        go(other)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match=r"is not empty and holds no artifact of ours"):
        go(build_work(tmp_path / "out", write_file))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", [None, ""])
def test_a_kill_before_the_claim_was_written(tmp_path: Path, content: str | None) -> None:
    """An empty folder, or one whose claim is still empty, belongs to nobody."""
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / "out" / ".key").write_text(content)
    go(build_work(tmp_path / "out", write_file))
    assert is_finished(tmp_path / "out")


def test_a_full_disk(tmp_path: Path) -> None:
    def full(settings: Any, context: Context) -> StageResult:
        write_file(settings, context)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match=r"the disk is full while writing .*free space and run the same command again"):
        go(build_work(tmp_path / "out", full))
    go(build_work(tmp_path / "out", write_file))


# ---- damage --------------------------------------------------------------------------------------------------------


def copy_artifact(artifact: Any, tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "copy"
    shutil.copytree(artifact("tokenizer"), folder)
    return folder, read_manifest(folder)["key"]


DAMAGE: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "missing": (lambda p: p.unlink(), False, r"model/tokenizer.json is missing"),
    "cut": (
        lambda p: p.write_bytes(p.read_bytes()[:-3]),
        False,
        r"model/tokenizer.json has \d+ bytes, the manifest says \d+",
    ),
    "changed": (
        lambda p: p.write_bytes(p.read_bytes()[:-3] + b"abc"),
        True,
        r"the content of model/tokenizer.json is not what the manifest says",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_artifact(artifact: Any, tmp_path: Path, kind: str) -> None:
    damage, deep, problem = DAMAGE[kind]
    folder, key = copy_artifact(artifact, tmp_path)
    check_artifact(folder, key, deep=True)
    damage(folder / "model" / "tokenizer.json")
    with pytest.raises(StoreError, match=rf"{problem}. Remove the folder and run the same command again"):
        check_artifact(folder, key, deep=deep)


def test_a_damaged_artifact_is_not_taken_as_done(artifact: Any, tmp_path: Path) -> None:
    folder, _ = copy_artifact(artifact, tmp_path)
    (folder / "model" / "tokenizer.json").unlink()
    with pytest.raises(StoreError, match=r"model/tokenizer.json is missing"):
        artifact.run("tokenizer", artifact.spec("tokenizer")[1], artifact.inputs("tokenizer"), folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"key": "x"}', "null"])
def test_a_damaged_manifest(artifact: Any, tmp_path: Path, text: str) -> None:
    folder, key = copy_artifact(artifact, tmp_path)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"the manifest of .*copy cannot be read .*remove the folder and run again"):
        check_artifact(folder, key)


def test_a_damaged_input_is_noticed(artifact: Any, tmp_path: Path) -> None:
    """A model of the store given as an input: its key would vouch for content that is no longer there."""
    folder = tmp_path / "copy"
    shutil.copytree(artifact("midtrain"), folder)
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"model/model.safetensors has \d+ bytes, the manifest says"):
        external_key(str(folder))


# ---- locks ---------------------------------------------------------------------------------------------------------


def test_a_lock_names_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "deep" / ".lock"
    owner = rf"the run x is in use by process {os.getpid()}; wait .*kill {os.getpid()}"
    with lock(path, "the run x"), pytest.raises(StoreError, match=owner), lock(path, "the run x"):
        raise AssertionError("two owners")
    with lock(path, "the run x"):
        assert path.read_text() == str(os.getpid())


def test_a_dead_owner_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import fcntl, os, sys, signal; h = open(sys.argv[1], 'a+'); fcntl.flock(h, fcntl.LOCK_EX);"
        "h.write('123456789'); h.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")], check=False)
    assert done.returncode == -9
    with lock(tmp_path / ".lock", "x"):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_an_artifact_is_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    def nested(settings: Any, context: Context) -> StageResult:
        with pytest.raises(StoreError, match=rf"out is in use by process {os.getpid()}"):
            go(build_work(context.workdir, write_file))
        return write_file(settings, context)

    go(build_work(tmp_path / "out", nested))
