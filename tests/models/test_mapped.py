"""Pages of mapped weights: which are given back, and that no number is lost."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from polm.models.halved import halve_matrices
from polm.models.loading import load_model
from polm.models.mapped import find_clean_mappings, release_pages

LISTING = """\
7f0000000000-7f0000002000 rw-p 00000000 fe:00 4711                       /models/a b/model.safetensors
Rss:                   8 kB
Anonymous:             0 kB
7f0000002000-7f0000003000 rw-p 00002000 fe:00 4711                       /models/a b/model.safetensors
Anonymous:             4 kB
7f0000003000-7f0000004000 rw-s 00003000 fe:00 4712                       /shared
Anonymous:             0 kB
7f0000004000-7f0000005000 rw-p 00003000 fe:00 4711                       /models/a b/model.safetensors
Anonymous:             0 kB
Swap:                  4 kB
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
Anonymous:             0 kB
7f0000007000-7f0000008000 r--p 00000000 fe:00 4713                       /usr/lib/libc.so.6
Anonymous:             0 kB
VmFlags: rd mr mw me
"""


def test_only_what_a_file_holds_unchanged_is_named() -> None:
    """Not a page that was written to, in memory or swapped out, not what processes share, not plain memory."""
    assert find_clean_mappings(LISTING) == [(0x7F0000000000, 0x7F0000002000), (0x7F0000007000, 0x7F0000008000)]
    assert find_clean_mappings("") == []


def read_resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping in which a tensor lies."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        header = re.match(r"^([0-9a-f]+)-([0-9a-f]+) ", line)
        if header:
            inside = int(header[1], 16) <= tensor.data_ptr() < int(header[2], 16)
        elif inside and line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
    return size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    expected = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    save_file({"a": expected, "b": expected + 1}, tmp_path / "w.safetensors")
    weights = load_file(tmp_path / "w.safetensors")
    assert torch.equal(weights["a"], expected)
    before, mappings = read_resident(weights["a"]), find_clean_mappings()
    released = release_pages(weights["a"], mappings)
    assert expected.nbytes - 2 * mmap.PAGESIZE < released <= expected.nbytes
    assert before - read_resident(weights["a"]) == released
    assert torch.equal(weights["a"], expected)
    assert torch.equal(weights["b"], expected + 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_what_was_written_to_stays(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(512, 1024)}, tmp_path / "w.safetensors")
    weight = load_file(tmp_path / "w.safetensors")["a"]
    weight[3, 3] = 7.0
    heap = torch.full((512, 1024), 5.0)
    mappings = find_clean_mappings()
    assert release_pages(weight, mappings) == release_pages(heap, mappings) == 0
    assert weight[3, 3] == 7.0
    assert bool((heap == 5.0).all())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_halving_gives_the_file_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
        )
    )
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    expected = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    released: list[int] = []
    monkeypatch.setattr(
        "polm.models.halved.release_pages", lambda *args: released.append(release_pages(*args)) or released[-1]
    )
    assert halve_matrices(loaded) > 0
    assert sum(released) > 0.9 * sum(p.nbytes for p in expected.values())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name
