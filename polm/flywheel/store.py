"""The artifact store: what a stage wrote, under a key that says what it was made from.

An artifact's key hashes the stage, its version, its semantic settings and its inputs' keys. Its manifest is written
last and atomically, so a folder without a manifest is unfinished, and running the stage again goes on in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from polm import __version__
from polm.config import Settings, semantic_values
from polm.data.fingerprint import fingerprint_bytes, fingerprint_path, fingerprint_values, list_files
from polm.data.readers import write_json
from polm.engine.checkpoint import list_checkpoints
from polm.errors import StoreError
from polm.models.adapters import is_adapter_folder, locate_base
from polm.models.kernels.build import describe_kernels
from polm.models.kernels.proof import describe_proofs
from polm.recipe_data import DataStage, FilesData, FolderData, WordProblemsData
from polm.recipe_rewards import RewardSettings
from polm.stages.common import Context, Report, Stage, StageResult, model_folder

MANIFEST = "manifest.json"
CLAIM = ".key"  # in an unfinished artifact: what it will be
SPENT = ".seconds"  # in an unfinished artifact: how long it was worked on
NOTE_SECONDS = 5.0  # between two notes of that
KEY_LENGTH = 12


def compute_key(stage: Stage, settings: Settings, input_keys: Mapping[str, str]) -> str:
    """The key of an artifact: sha256 over what it is made from. Paths in the data settings go in by content."""
    values = semantic_values(settings)
    if isinstance(settings, DataStage) and isinstance(settings.data, FolderData | WordProblemsData):
        path = settings.data.path
        values["data"]["path"] = fingerprint_path(path) if path.exists() else str(path)
    if isinstance(settings, DataStage) and isinstance(settings.data, FilesData):
        values["data"] = _fingerprint_paths(values["data"])
    if isinstance(settings, RewardSettings) and settings.reward_function is not None:
        file, _, name = settings.reward_function.rpartition(":")
        values["reward_function"] = [fingerprint_path(Path(file)) if Path(file).is_file() else file, name]
    return fingerprint_values(
        {"stage": stage.name, "version": stage.version, "settings": values, "inputs": dict(input_keys)}
    )


def _fingerprint_paths(value: Any) -> Any:
    """The values with every `path` and `benchmarks` that exists replaced by its content's fingerprint."""
    if isinstance(value, dict):
        files = {
            name: fingerprint_path(Path(inner))
            for name, inner in value.items()
            if name in ("path", "benchmarks") and isinstance(inner, str) and Path(inner).exists()
        }
        return {name: _fingerprint_paths(inner) for name, inner in value.items()} | files
    return [_fingerprint_paths(inner) for inner in value] if isinstance(value, list) else value


def external_key(source: str) -> str:
    """The key of an input from outside the store: its manifest's key, its content's hash, or a hub id as it is.

    Raises StoreError for an artifact whose files are not what its manifest says.
    """
    path = Path(source)
    if (path / MANIFEST).is_file():
        return str(check_artifact(path, str(read_manifest(path)["key"]))["key"])
    if is_adapter_folder(model_folder(source)):  # its base is a part of what it is
        base, _ = locate_base(model_folder(source))
        return fingerprint_values({"adapter": fingerprint_path(path), "base": external_key(base)})
    return fingerprint_path(path) if path.exists() else f"hub:{source}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact; StoreError when it is damaged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        manifest["key"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the manifest of {folder} cannot be read ({error}); remove the folder and run again"
        ) from error
    return manifest


def is_finished(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def check_artifact(folder: Path, key: str, *, deep: bool = False) -> dict[str, Any]:
    """The manifest of a finished artifact, checked against the files (sizes; with `deep`, contents)."""
    manifest = read_manifest(folder)
    if manifest["key"] != key:
        raise StoreError(
            f"{folder} holds another artifact (key {manifest['key'][:KEY_LENGTH]}, expected {key[:KEY_LENGTH]}: other "
            "settings or inputs); give another out=FOLDER, or remove this one"
        )
    for name, info in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problem = f"{name} is missing"
        elif path.stat().st_size != info["bytes"]:
            problem = f"{name} has {path.stat().st_size} bytes, the manifest says {info['bytes']}"
        elif deep and fingerprint_bytes(path) != info["sha256"]:
            problem = f"the content of {name} is not what the manifest says"
        else:
            continue
        raise StoreError(
            f"the artifact {folder} does not match its manifest: {problem}. Remove the folder and run the same "
            "command again: it is made anew, and what it feeds keeps its key"
        )
    return manifest


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock file; StoreError names the live process that has it. A dead one leaves no lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        raise StoreError(f"{what} cannot be written: {error}; give another folder") from error
    with opened as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise StoreError(
                f"{what} is in use by process {owner}; wait for it, or stop it (kill {owner}) and run again"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


@dataclass(frozen=True)
class Work:
    """One stage to be run into one folder."""

    stage: Stage
    settings: Settings
    inputs: Mapping[str, str]
    input_keys: Mapping[str, str]
    folder: Path

    @property
    def key(self) -> str:
        return compute_key(self.stage, self.settings, self.input_keys)


def execute(work: Work, context: Context) -> dict[str, Any]:
    """Run a stage unless its artifact is there already; returns the manifest.

    Raises StoreError when the folder is in use, holds another artifact, or the disk is full. After a kill the same
    call goes on from what the stage left, and the manifest's `seconds` are those of all attempts (see `_Stopwatch`).
    """
    key = work.key
    if is_finished(work.folder):
        return check_artifact(work.folder, key)
    with lock(work.folder.with_name(f".{work.folder.name}.lock"), str(work.folder)):
        if is_finished(work.folder):  # by a process that held the lock until now
            return check_artifact(work.folder, key)
        _claim(work.folder, key)
        _reset_peak_memory()
        started = datetime.now(UTC)
        watch = _Stopwatch(work.folder)
        try:
            result = work.stage.run(work.settings, replace(context, report=watch.noting(context.report)))
        except BaseException as error:
            watch.note()
            _unclaim(work.folder)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"the disk is full while writing {work.folder}; free space and run the same command again"
                ) from error
            raise
        seconds = watch.note()
        manifest = write_manifest(work, key, result, started, seconds)
        (work.folder / SPENT).unlink(missing_ok=True)
        return manifest


class _Stopwatch:
    """How long a stage has run, over all attempts in its folder: also for what a kill threw away, as that was paid for.

    It is noted in the folder at the end of an attempt and, as a kill gives no warning, with the progress that the stage
    reports, every NOTE_SECONDS at most. So a kill forgets the time since the last note, and a stage that reports
    nothing starts from zero.
    """

    def __init__(self, folder: Path):
        self._file = folder / SPENT
        try:
            before = float(self._file.read_text())
        except (OSError, ValueError):  # no earlier attempt, or the power failed within a note
            before = 0.0
        self._began = time.perf_counter() - before
        self._noted = -NOTE_SECONDS

    def note(self) -> float:
        """Write down the seconds so far, and return them. That it cannot be written is no reason to stop a stage."""
        self._noted = time.perf_counter()
        seconds = self._noted - self._began
        with contextlib.suppress(StoreError):
            write_json(self._file, round(seconds, 3))
        return seconds

    def noting(self, report: Report) -> Report:
        """`report`, with a note now and then."""

        def report_and_note(line: Mapping[str, Any]) -> None:
            report(line)
            if time.perf_counter() - self._noted >= NOTE_SECONDS:
                self.note()

        return report_and_note


def _claim(folder: Path, key: str) -> None:
    """Note in an unfinished folder which key it is for; leftovers of another key are refused, never mixed."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / CLAIM
    owner = claim.read_text() if claim.is_file() else ""  # empty after a kill within the write below
    if owner not in ("", key):
        if list_checkpoints(folder):
            raise StoreError(
                f"{folder} holds an unfinished artifact of other settings, with a checkpoint; "
                "remove it or give another folder"
            )
        # Nothing worth keeping: what a mistake in settings or inputs left must not stand in the way of its cure.
        shutil.rmtree(folder)
        folder.mkdir()
        owner = ""
    if not owner:
        if any(path != claim for path in folder.iterdir()):
            raise StoreError(f"{folder} is not empty and holds no artifact of ours; give an empty or new folder")
        claim.write_text(key)


def _unclaim(folder: Path) -> None:
    """After a failure that left nothing (a mistake in the inputs), the folder must not stand in the way of the cure."""
    if {path.name for path in folder.iterdir()} <= {CLAIM, SPENT}:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _reset_peak_memory() -> None:
    """Let Linux count the peak from here on, as a worker runs many stages; elsewhere it counts the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _read_peak_memory() -> float:
    """Peak resident memory in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1)
    except (OSError, StopIteration):
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def collect_versions() -> dict[str, str]:
    """What the numbers were made with."""
    packages = ["torch", "transformers", "tokenizers", "numpy", "math-verify"]
    packages += [name for name in ("peft", "liger-kernel", "triton") if find_spec(name.replace("-", "_")) is not None]
    machine = {"python": platform.python_version(), "cpu_cores": str(os.cpu_count()), "machine": platform.machine()}
    machine["row_kernels"] = describe_kernels()
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"polm": __version__, **{name: version(name) for name in packages}, **machine}


def write_manifest(work: Work, key: str, result: StageResult, started: datetime, seconds: float) -> dict[str, Any]:
    """Hash every file, then write the manifest, last and atomically."""
    files = {
        str(p.relative_to(work.folder)): {"bytes": p.stat().st_size, "sha256": fingerprint_bytes(p)}
        for p in list_files(work.folder)
        if p.name != MANIFEST
    }
    manifest = {
        "key": key,
        "stage": work.stage.name,
        "version": work.stage.version,
        "config": semantic_values(work.settings),
        "inputs": dict(work.input_keys),
        "files": files,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_rss_mb": _read_peak_memory(),
        "threads": torch.get_num_threads(),
        "versions": collect_versions() | ({"gpu_kernels": tried} if (tried := describe_proofs()) else {}),
        "summary": dict(result.summary),
        "ledger": dict(result.ledger),
    }
    temporary = work.folder / ".manifest.json.tmp"
    with temporary.open("w") as handle:
        json.dump(manifest, handle, indent=2)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(work.folder / MANIFEST)
    return manifest
