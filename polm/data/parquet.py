"""Parquet files as rows. The one place that imports pyarrow, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polm.errors import DataError

BATCH_ROWS = 1024


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, row), a batch of rows in memory at a time.

    A field that is null is left out below the columns: in Parquet every struct has every field, so null means absent.

    Raises:
        DataError: pyarrow is not installed, or the file is missing, damaged or empty.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet files need pyarrow, which is not installed: pip install 'polm[parquet]', or convert the "
            "file to JSON lines"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: drop_null(value) for name, value in row.items()}
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give the path of a .parquet file") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file (after row {number}): {error}") from error
    if number == 0:
        raise DataError(f"{path} holds no rows")


def drop_null(value: Any) -> Any:
    """The value without fields of objects that are null."""
    if isinstance(value, dict):
        return {key: drop_null(item) for key, item in value.items() if item is not None}
    return [drop_null(item) for item in value] if isinstance(value, list) else value
