"""Data sets of the Hugging Face hub as rows. The one place that imports `datasets`, an optional dependency.

`hub:OWNER/NAME`, `hub:OWNER/NAME:SPLIT` or `hub:OWNER/NAME:CONFIG:SPLIT`; a local folder in place of OWNER/NAME works
as well. Rows are streamed; without a network only what is a local folder can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polm.data.parquet import drop_null
from polm.errors import DataError

HUB_PREFIX = "hub:"


def parse_hub_id(source: str) -> tuple[str, str | None, str]:
    """(name, config or None, split) of a `hub:` source; the split is `train` where none is named."""
    name, *rest = source.removeprefix(HUB_PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise DataError(f"{source!r} is not hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def read_hub(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, row) of a hub data set. As in Parquet, a field that is null is left out.

    Raises:
        DataError: `datasets` is not installed, or it cannot find or read the data set.
    """
    name, config, split = parse_hub_id(source)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: data sets of the hub need `datasets`, which is not installed: pip install 'polm[hub]', or "
            "download the files and give their path"
        ) from error
    number = 0
    try:
        for row in datasets.load_dataset(name, config, split=split, streaming=True):
            number += 1
            yield number, {name: drop_null(value) for name, value in row.items()}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: cannot be read (after row {number}): {error}. Check the name, the config and the split; "
            "without a network, download the files and give their path"
        ) from error
    if number == 0:
        raise DataError(f"{source} holds no rows")
