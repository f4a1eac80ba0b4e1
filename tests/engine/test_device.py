"""Where and how precisely a stage computes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from polm.engine import device
from polm.engine.device import SMALL_MODEL, sample_in_bf16, set_threads, use_bf16
from polm.errors import UserError


@pytest.mark.parametrize(
    ("precision", "native", "expected"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("bf16", True, True),
        ("bf16", False, True),  # emulated on a CPU: slow, but it is what was asked for
        ("fp32", True, False),
        ("fp32", False, False),
    ],
)
def test_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch, precision: str, native: bool, expected: bool) -> None:
    monkeypatch.setattr(device, "has_cpu_bf16", lambda: native)
    monkeypatch.setattr(device, "has_pairs", lambda: True)
    assert use_bf16(precision, "cpu") is expected
    assert sample_in_bf16(precision, "cpu", 10) is expected
    monkeypatch.setattr(device, "has_pairs", lambda: False)
    assert sample_in_bf16(precision, "cpu", SMALL_MODEL) is expected
    # A small model samples in float32 without the kernels of decoding, unless bf16 was asked for by name.
    assert sample_in_bf16(precision, "cpu", SMALL_MODEL - 1) is (precision == "bf16")


@pytest.mark.parametrize("native", [True, False])
def test_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    assert use_bf16("auto", "cuda") is native
    assert use_bf16("fp32", "cuda") is False
    assert sample_in_bf16("auto", "cuda", 10) is native
    if native:
        assert use_bf16("bf16", "cuda") is True
    else:
        with pytest.raises(UserError, match=r"this GPU does not multiply bf16; use precision: fp32"):
            use_bf16("bf16", "cuda")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("polm.engine.device.count_cores", lambda: 6)
    assert [set_threads(n) for n in (1, 3, 0)] == [1, 3, 6] == chosen
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", {"avx512f", "avx512_bf16", "amx_bf16"}, True),
        ("GenuineIntel", {"avx512f", "avx512_bf16"}, False),
        ("AuthenticAMD", {"avx512f", "avx512_bf16"}, True),
        ("AuthenticAMD", {"avx2"}, False),
        ("", set(), False),
    ],
)
def test_bf16_is_chosen_where_it_is_faster(vendor: str, flags: set[str], fast: bool) -> None:
    assert device.is_bf16_fast(vendor, flags) is fast


FAULTS = """
import resource, torch
from polm.engine.device import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum(count() for _ in range(40)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this allocator")
def test_freed_memory_is_used_again() -> None:
    """32 MB asked for again and again: without the setting the kernel maps each page of it anew."""
    counts = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, check=True).stdout)
        for kept in (True, False)
    ]
    # Not each block fits into what the last one left, as blocks are aligned: the heap grows a few times.
    assert counts[0] < counts[1] / 2
