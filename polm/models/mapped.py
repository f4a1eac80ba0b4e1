"""Memory of weights that are mapped from a file: given back to the system as soon as a copy of them is made.

A mapped file counts as the process's memory as far as it was read, and is unmapped only with its last tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

Range = tuple[int, int]  # addresses: the first, and one past the last
# What a private mapping holds of its own, in memory or swapped out.
WRITTEN = ("Anonymous:", "Swap:", "Private_Hugetlb:")
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)")


def find_clean_mappings(listing: str | None = None) -> list[Range]:
    """The mappings of files into this process that nobody has written to: what they hold can be read again.

    `listing` is the text of Linux's `/proc/self/smaps`, read where it is not given; elsewhere nothing is found.
    """
    if listing is None:
        try:
            listing = Path("/proc/self/smaps").read_text(errors="replace")
        except OSError:
            return []
    found: list[Range] = []
    current: Range | None = None
    for line in listing.splitlines():
        header = HEADER.match(line)
        if header:
            found += [current] if current is not None else []
            first, end, rights, inode = header.groups()
            current = (int(first, 16), int(end, 16)) if inode != "0" and rights[3] == "p" else None
        elif line.startswith(WRITTEN) and line.split()[1] != "0":
            current = None
    return found + ([current] if current is not None else [])


def release_pages(tensor: Tensor, mappings: Sequence[Range]) -> int:
    """Give back the pages of a tensor on the CPU that lie wholly within it and in one of `mappings`; returns the bytes.

    It keeps its numbers: whoever reads them again reads them from the file.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return 0
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if not any(low <= first and end <= high for low, high in mappings):
        return 0
    first += -first % mmap.PAGESIZE
    size = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size <= 0:
        return 0
    failed = ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    return 0 if failed else size
