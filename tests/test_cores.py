from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polm import cores
from polm.apps import cli
from polm.cores import count_cores, read_quota
from polm.recipe import SFTSettings


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": ""}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_quota(tmp_path) == expected


def test_a_quota_bounds_what_the_scheduler_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    allowed = count_cores()
    assert 1 <= allowed <= (os.cpu_count() or 1)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert count_cores() == 1
    (tmp_path / "cpu.max").write_text("100000000 100000\n")
    assert count_cores() == allowed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sched_setaffinity")
def test_a_process_held_to_one_core_counts_one() -> None:
    words = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    words += "from polm.cores import count_cores; print(count_cores())"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_stage_by_itself_uses_all_cores(tmp_path: Path) -> None:
    """In a recipe stages run side by side, on one core each; so does one that is run alone to its letter."""
    (tmp_path / "mine.yaml").write_text("updates: 1\n")
    (tmp_path / "one.yaml").write_text("updates: 1\nthreads: 1\n")

    def load(recipe: str | None, *words: str) -> int:
        return cli.load_stage_settings(SFTSettings, "sft", recipe, words).threads  # type: ignore[attr-defined, no-any-return]

    assert load(None) == load(str(tmp_path / "mine.yaml")) == 0
    assert load("demo") == load(str(tmp_path / "one.yaml")) == 1
    assert load(None, "threads=3") == load("demo", "threads=3") == 3
