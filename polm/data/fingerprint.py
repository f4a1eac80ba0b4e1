"""Fingerprints: what a file, a folder or a set of settings is, as a sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from polm.tokens import Tree


def fingerprint_bytes(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_values(values: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def list_files(folder: Path) -> list[Path]:
    """The regular files below a folder, sorted by their path; hidden ones are left out."""
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def fingerprint_path(path: Path) -> str:
    """sha256 of a file, or of a folder's names and contents."""
    if path.is_file():
        return fingerprint_bytes(path)
    return fingerprint_values({str(p.relative_to(path)): fingerprint_bytes(p) for p in list_files(path)})


def fingerprint_trees(trees: Iterable[Tree]) -> str:
    """sha256 of the token ids, the shape and the targets of trees: the data as a model sees it.

    Which tokens are targets counts, as scores are computed only there; how much they weigh does not.
    """
    digest = hashlib.sha256()
    for tree in trees:
        for segment in tree:
            digest.update(np.array([len(segment), segment.parent], dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(segment.tokens, dtype=np.int64).tobytes())
            weights = segment.streams.get("weights")
            if weights is not None:
                digest.update(np.packbits(weights != 0).tobytes())
    return digest.hexdigest()
