"""The decoding cache against attention written out over each row's own past."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from polm.errors import ModelError
from polm.rollout.cache import CacheShape, DecodeCache, compute_ranges, read_cache_shape

SHAPE = CacheShape(num_layers=2, num_key_heads=2, head_width=4)
CPU = torch.device("cpu")


def test_ranges_by_hand() -> None:
    members, offsets = compute_ranges(np.array([10, 3, 7]), np.array([2, 1, 3]))
    assert members.tolist() == [10, 11, 3, 7, 8, 9]
    assert offsets.tolist() == [0, 1, 0, 0, 1, 2]


def attend_alone(query_HD: torch.Tensor, key_JKD: torch.Tensor, value_JKD: torch.Tensor) -> torch.Tensor:
    """Two query heads share each key head."""
    heads = []
    for head, query in enumerate(query_HD):
        weights = torch.softmax(key_JKD[head // 2] @ query * 0.5, dim=0)
        heads.append(weights @ value_JKD[head // 2])
    return torch.stack(heads)


@pytest.mark.parametrize("window", [None, 3, 1])
def test_each_row_sees_its_own_past_within_the_window(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = DecodeCache(SHAPE, num_slots=4, length=9, dtype=torch.float32, device=CPU)
    past = [5, 2, 8]  # tokens before the one that is fed
    keys, values = (torch.randn(2, 2, sum(past), 4, generator=generator) for _ in range(2))
    members, positions = compute_ranges(np.array([0, 5, 7]), np.array(past))
    cache.fill(
        {layer: (keys[layer], values[layer]) for layer in (0, 1)}, members, np.repeat([0, 1, 3], past), positions
    )
    cache.move(np.array([3]), np.array([2]), length=8)  # the third row stood in another slot

    query = torch.randn(4, 3, 4, generator=generator)
    new_key, new_value = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    assert cache.begin_step(np.array(past)).tolist() == past
    for layer in (0, 1):
        out_RHD = cache.attend(layer, query, new_key, new_value, 0.5, window)
        for row, start in enumerate([0, 5, 7]):
            own = slice(start, start + past[row])
            key = torch.cat([keys[layer][:, own], new_key[:, row : row + 1]], dim=1)
            value = torch.cat([values[layer][:, own], new_value[:, row : row + 1]], dim=1)
            first = 0 if window is None else max(0, past[row] + 1 - window)
            expected = attend_alone(query[:, row], key[:, first:], value[:, first:])
            assert torch.allclose(out_RHD[row], expected, atol=1e-6), (layer, row)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_room_that_no_row_uses_takes_no_memory() -> None:
    def read_resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))

    for dtype in (torch.float32, torch.bfloat16):
        before = read_resident()
        cache = DecodeCache(CacheShape(2, 2, 64), num_slots=64, length=4096, dtype=dtype, device=CPU)
        assert cache.store.nbytes >= 1 << 28
        used = cache.store[:, :, :, :, :8]
        assert not used.any()
        used.fill_(1.0)
        assert read_resident() - before < 1 << 26


def test_what_an_earlier_row_left_behind_is_not_seen() -> None:
    cache = DecodeCache(SHAPE, num_slots=2, length=6, dtype=torch.float32, device=CPU)
    cache.store.fill_(1e4)
    cache.begin_step(np.array([0, 4]))  # the second row makes the step read five positions of both
    value = torch.arange(16.0).view(2, 2, 4)
    out = cache.attend(0, torch.ones(4, 2, 4), torch.ones(2, 2, 4), value, 0.5, None)
    assert torch.equal(out[0], value[:, 0].repeat_interleave(2, dim=0))


def test_shape_of_a_config_and_a_mismatch() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 3}
    config = AutoConfig.for_model("llama", num_attention_heads=6, num_key_value_heads=2, **sizes)
    shape = read_cache_shape(AutoModelForCausalLM.from_config(config))
    assert shape == CacheShape(num_layers=3, num_key_heads=2, head_width=4)
    assert shape.num_values == 2 * 3 * 2 * 4

    cache = DecodeCache(SHAPE, num_slots=1, length=2, dtype=torch.float32, device=CPU)
    one = np.zeros(1, dtype=np.int64)
    wrong = torch.zeros(1, 1, 4)
    with pytest.raises(ModelError, match="1 key heads of width 4, the config says 2 of 4"):
        cache.fill({0: (wrong, wrong), 1: (wrong, wrong)}, one, one, one)
    with pytest.raises(ModelError, match=r"2 layers, of which 1 use"):
        cache.fill({0: (wrong, wrong)}, one, one, one)
