"""Where a stage computes, and in which precision."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from polm.errors import UserError

SMALL_MODEL = 20_000_000  # parameters


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
    """`use_bf16` for the generator. `auto` on a CPU means: from 20 M parameters on.

    A decoding batch shrinks row by row, each width is a new shape, and CPU bf16 products are compiled for each shape:
    a small model spends more on that than it gains.
    """
    small = device == "cpu" and num_parameters < SMALL_MODEL
    return use_bf16(precision, device) and not (precision == "auto" and small)


def has_cpu_bf16() -> bool:
    """Whether the CPU has bf16 products (AVX512-BF16 or AMX); elsewhere torch emulates them slowly."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as handle:
            flags = next((line for line in handle if line.startswith("flags")), "")
    except OSError:
        return False  # not Linux: no way to ask without a dependency
    return "avx512_bf16" in flags or "amx_bf16" in flags


def set_threads(threads: int) -> int:
    """Fix the number of CPU threads (0 = all cores); returns it. The bits of a result depend on this number."""
    chosen = threads or os.cpu_count() or 1
    torch.set_num_threads(chosen)
    return chosen
