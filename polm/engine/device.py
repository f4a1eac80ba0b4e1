"""Where a stage computes, and in which precision."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from polm.cores import count_cores
from polm.errors import UserError
from polm.models.kernels.build import has_pairs

SMALL_MODEL = 20_000_000  # parameters
# Of glibc's malloc.h: the two parameters of mallopt that are set.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def pick_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_bf16(precision: str, device: str) -> bool:
    """Whether products run in bf16. `auto` means: where the hardware multiplies bf16 natively."""
    native = torch.cuda.is_bf16_supported() if device == "cuda" else has_cpu_bf16()
    if precision == "bf16" and not native and device == "cuda":
        raise UserError("precision: bf16, but this GPU does not multiply bf16; use precision: fp32")
    return native if precision == "auto" else precision == "bf16"


def sample_in_bf16(precision: str, device: str, num_parameters: int) -> bool:
    """`use_bf16` for the generator. `auto` on a CPU without our kernels for decoding means: from 20 M parameters on.

    A decoding batch shrinks row by row, each width is a new shape, and the library's bf16 products are compiled for
    each shape: a small model spends more on that than it gains.
    """
    small = device == "cpu" and num_parameters < SMALL_MODEL and not has_pairs()
    return use_bf16(precision, device) and not (precision == "auto" and small)


def has_cpu_bf16() -> bool:
    """Whether bf16 products are faster than float32 ones on this CPU; where unknown, no."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False  # not Linux: no way to ask without a dependency
    lines = [line.partition(":") for line in text.splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    return is_bf16_fast(facts.get("vendor_id", ""), set(facts.get("flags", "").split()))


def is_bf16_fast(vendor: str, flags: Collection[str]) -> bool:
    """AMX multiplies bf16 fast, and so does AVX512-BF16 of AMD's cores; on Intel's it is slower than float32.

    Measured with torch 2.13: a Zen 4 core 190 GF/s in bf16 and 55 to 90 in float32; a Sapphire Rapids core whose AMX
    is hidden by the virtual machine 52 and 94.
    """
    return "amx_bf16" in flags or ("avx512_bf16" in flags and vendor == "AuthenticAMD")


def set_threads(threads: int) -> int:
    """Fix the number of CPU threads (0 = all cores); returns it. The bits of a result depend on this number."""
    chosen = threads or count_cores()
    torch.set_num_threads(chosen)
    return chosen


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next ones; False where there is no glibc.

    Large blocks otherwise come fresh from the kernel, which clears each page again in every update. The process's
    size stays at its peak until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another libc
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
