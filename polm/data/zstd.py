"""Zstandard streams. The one place that imports zstandard, which is an optional dependency."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from polm.errors import DataError


def open_zstd(path: Path) -> BinaryIO:
    """The decompressed bytes of a file, of one frame or several, as a buffered stream. What is damaged raises OSError.

    Raises:
        DataError: zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path}: .zst files need zstandard, which is not installed: pip install 'polm[zstd]', or decompress the "
            "file first"
        ) from error

    class Raw(io.RawIOBase):
        """Reads as the decompressor does, with its own error type turned into OSError."""

        def __init__(self) -> None:
            self.file = path.open("rb")
            self.reader = zstandard.ZstdDecompressor().stream_reader(self.file, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            try:
                return int(self.reader.readinto(buffer))
            except zstandard.ZstdError as error:
                raise OSError(f"damaged zstd data: {error}") from error

        def close(self) -> None:
            self.file.close()
            super().close()

    return io.BufferedReader(Raw(), 1 << 20)
