"""Fingerprints tell apart what differs, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from polm.data.fingerprint import (
    fingerprint_bytes,
    fingerprint_path,
    fingerprint_trees,
    fingerprint_values,
    list_files,
)
from polm.tokens import build_completions, build_document


def test_bytes_are_a_plain_sha256(tmp_path: Path) -> None:
    content = b"x" * ((1 << 20) + 3)  # more than one block
    (tmp_path / "f").write_bytes(content)
    assert fingerprint_bytes(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    assert fingerprint_path(tmp_path / "f") == fingerprint_bytes(tmp_path / "f")


def test_values() -> None:
    assert fingerprint_values({"a": 1, "b": [1, 2]}) == fingerprint_values({"b": [1, 2], "a": 1})
    different = [
        {"a": 1, "b": [2, 1]},
        {"a": 1.5, "b": [1, 2]},
        {"a": "1", "b": [1, 2]},
        {"a": 1},
        {"a": {"b": [1, 2]}},
    ]
    prints = [fingerprint_values(v) for v in [{"a": 1, "b": [1, 2]}, *different]]
    assert len(set(prints)) == len(prints)


def test_a_folder_is_its_names_and_contents(tmp_path: Path) -> None:
    def write(name: str, **files: str) -> Path:
        folder = tmp_path / name
        for file, text in files.items():
            path = folder / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return folder

    same = write("one", a="1", sub__b="2")
    other_order = write("two", sub__b="2", a="1")
    assert fingerprint_path(same) == fingerprint_path(other_order)
    assert fingerprint_path(write("three", a="1", sub__b="3")) != fingerprint_path(same)
    assert fingerprint_path(write("four", a="1", sub__c="2")) != fingerprint_path(same)
    assert fingerprint_path(write("five", a="1")) != fingerprint_path(same)
    (other_order / ".hidden").write_text("x")
    (other_order / "sub" / ".b.tmp").write_text("x")
    assert fingerprint_path(other_order) == fingerprint_path(same)
    assert [str(p.relative_to(other_order)) for p in list_files(other_order)] == ["a", "sub/b"]


def test_files_in_a_hidden_parent_are_seen(tmp_path: Path) -> None:
    """Only what is hidden below the folder is left out: the folder itself may lie in ~/.cache."""
    folder = tmp_path / ".cache" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert [p.name for p in list_files(folder)] == ["config.json"]


def test_trees_are_their_tokens_and_their_shape() -> None:
    document = build_document([1, 2, 3, 4])
    scored = build_document([1, 2, 3, 4], {"ref_logprobs": np.zeros(4, np.float32)})
    assert fingerprint_trees([document]) == fingerprint_trees([scored])  # scores are laid over the same tokens
    weighed = build_document([1, 2, 3, 4], {"weights": np.array([0, 1, 0.5, 2], np.float32)})
    assert fingerprint_trees([document]) == fingerprint_trees([weighed])
    others = [
        [build_document([1, 2, 3, 5])],
        [build_document([1, 2]), build_document([3, 4])],
        [build_completions([1, 2], [[3, 4]])],
        [build_completions([1, 2], [[3], [4]])],
        [document, document],
        [build_document([1, 2, 3, 4], {"weights": np.array([0, 1, 0, 1], np.float32)})],  # other targets
        [],
    ]
    prints = {fingerprint_trees(trees) for trees in [[document], *others]}
    assert len(prints) == 1 + len(others)
