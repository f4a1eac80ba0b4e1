"""FlexAttention's mask says what the forest says, and gives the numbers of the batched products.

What runs on a GPU is compiled; here the same functions run as plain operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as library

from polm.models import flex_attention as ours
from polm.models.flex_attention import (
    Layout,
    attend_flex,
    build_sees,
    explain_flex_absence,
    find_tiles,
    mark_tokens,
    number_segments,
)
from polm.models.forest_attention import ForestPlan, build_plan
from polm.tokens import Segment, TokenBatch, collate


def draw_forest(lengths: Sequence[int], parents: Sequence[Sequence[int]], seed: int = 0) -> TokenBatch:
    """A batch of trees; `parents` lists the parents of each tree's segments, which have the next of `lengths`."""
    rng, sizes = np.random.default_rng(seed), iter(lengths)
    return collate(
        [tuple(Segment(rng.integers(1, 9, next(sizes)), parent=parent) for parent in tree) for tree in parents]
    )


# Plain operations in place of the compiled kernel are what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

FORESTS = {
    "documents": draw_forest([5, 300, 17, 1], [[-1], [-1], [-1], [-1]]),
    "group": draw_forest([200, 90, 1, 140, 33], [[-1, 0, 0, 0], [-1]]),
    "deep": draw_forest([30, 100, 20, 130, 0, 60, 9, 7], [[-1, 0, 1, 0, 3, 4], [-1, 0]]),
    "one tile": draw_forest([3, 2], [[-1, 0]]),
    "whole tiles": draw_forest([128, 256], [[-1, 0]]),
}


def list_seen(batch: TokenBatch, spare: int, window: int | None) -> torch.Tensor:
    """The rule in the words of `tokens.py`: its own segment so far and all ancestors, within the window."""
    total = batch.num_tokens + spare
    seen = torch.zeros(total, total, dtype=torch.bool)
    segments, parents, positions = batch.segments_T.tolist(), batch.parents_S.tolist(), batch.positions_T.tolist()
    for query in range(batch.num_tokens):
        path, segment = set(), segments[query]
        while segment >= 0:
            path.add(segment)
            segment = parents[segment]
        for key in range(query + 1):
            near = window is None or positions[query] - positions[key] < window
            seen[query, key] = segments[key] in path and near
    seen[range(batch.num_tokens, total), range(batch.num_tokens, total)] = True
    return seen


def test_numbers_in_pre_order_by_hand() -> None:
    first, end = number_segments([-1, 0, 0, 1, -1, 4])
    assert first.tolist() == [0, 1, 3, 2, 4, 5]
    assert end.tolist() == [4, 3, 4, 3, 6, 6]


@pytest.mark.parametrize(("name", "spare", "window"), itertools.product(FORESTS, [0, 9], [None, 1, 50, 140]))
def test_the_mask_is_the_forest(name: str, spare: int, window: int | None) -> None:
    """Each pair is in the mask where the rule says so; tiles that are left out or whole are exactly those."""
    batch = FORESTS[name]
    expected = list_seen(batch, spare, window)
    layout = batch.layout
    places = torch.arange(len(expected))
    sees = build_sees(torch.from_numpy(mark_tokens(layout, spare, window)))
    assert torch.equal(sees(places, places, places[:, None], places[None, :]), expected)
    some, whole = find_tiles(layout, spare, window)
    for row, column in itertools.product(range(len(some)), repeat=2):
        tile = expected[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
        assert whole[row, column] == bool(tile.all() and tile.numel() == 128 * 128)
        assert some[row, column] == bool(tile.any() and not whole[row, column])


@pytest.mark.parametrize(("name", "spare", "window"), itertools.product(FORESTS, [0, 9], [None, 50]))
def test_numbers_and_gradients_are_those_of_the_batched_products(
    name: str, spare: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library has a backward pass of plain operations for CPUs, which it does not offer.
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    batch = FORESTS[name]
    plan = build_plan(batch, 4, spare)
    generator = torch.Generator().manual_seed(1)
    total = batch.num_tokens + spare
    given = [torch.randn(heads, total, 8, generator=generator) for heads in (4, 2, 2)]
    pull = torch.randn(total, 4, 8, generator=generator)
    pull[batch.num_tokens :] = 0.0  # nobody reads a spare row
    results = []
    for attend in (
        lambda q, k, v: attend_flex(q, k, v, plan.block_mask(window), 0.3, compiled=False),
        lambda q, k, v: plan.attend(0, q, k, v, 0.3, window),
    ):
        inputs = [x.clone().requires_grad_() for x in given]
        out = attend(*inputs)
        results.append([out[: batch.num_tokens].detach(), *torch.autograd.grad((out * pull).sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=2e-6), (found - expected).abs().max()


def test_a_new_batch_is_no_new_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths, other trees, other numbers of tiles, other windows: nothing is compiled again."""
    torch._dynamo.reset()
    compiled: list[int] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(len(inputs))
        return graph

    monkeypatch.setattr(ours, "_compile", lambda: torch.compile(library.flex_attention, dynamic=True, backend=note))
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    counts = []
    for seed, lengths in enumerate([[150, 60, 70], [190, 300, 9], [40, 300, 5], [500, 1, 200], [129, 130, 131]]):
        batch = draw_forest(lengths, [[-1, 0], [-1]], seed)
        plan = build_plan(batch, 4)
        # As the layers hand them over: views of products, with the tokens first in memory.
        q, k, v = (torch.randn(sum(lengths), heads, 16).transpose(0, 1) for heads in (4, 2, 2))
        for window, grad in itertools.product([None, 100], [False, True]):
            with torch.set_grad_enabled(grad):
                found = attend_flex(q.clone().requires_grad_(grad), k, v, plan.block_mask(window), 0.25)
            expected = plan.attend(0, q, k, v, 0.25, window)
            assert torch.allclose(found, expected, atol=2e-6)
        counts.append(len(compiled))
    assert 2 <= counts[0] <= 4  # with gradients and without
    assert set(counts) == {counts[0]}


class TestTheProof:
    """What decides, on a GPU, whether FlexAttention is taken."""

    @pytest.fixture(autouse=True)
    def _on_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "_validate_device", lambda *_: None)
        monkeypatch.setattr(ours, "_compile", lambda: library.flex_attention)
        explain_flex_absence.cache_clear()

    def test_right_numbers_pass(self) -> None:
        assert explain_flex_absence(torch.device("cpu"), torch.float32, 4, 2, 16) is None

    def test_narrow_heads_and_the_switch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "narrower than 16" in str(explain_flex_absence(torch.device("cpu"), torch.float32, 4, 2, 8))
        monkeypatch.setenv("POLM_KERNELS", "off")
        assert explain_flex_absence(torch.device("cpu"), torch.float32, 4, 2, 32) == "POLM_KERNELS is off"

    def test_a_wrong_mask_does_not_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = ours.find_tiles

        def forget_one(layout: Layout, spare: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
            some, whole = right(layout, spare, window)
            some[tuple(np.argwhere(some)[0])] = False
            return some, whole

        monkeypatch.setattr(ours, "find_tiles", forget_one)
        monkeypatch.setattr(ours, "attend_flex", attend_by_tiles)
        assert "differs from plain operations" in str(
            explain_flex_absence(torch.device("cpu"), torch.float32, 4, 2, 16)
        )

    def test_a_failure_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no kernel for this GPU\nsecond line")

        monkeypatch.setattr(ours, "_compile", lambda: fail)
        reason = explain_flex_absence(torch.device("cpu"), torch.float32, 2, 2, 16)
        assert reason == "does not run here: RuntimeError: no kernel for this GPU"


def attend_by_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: library.BlockMask, scale: float
) -> torch.Tensor:
    """As the compiled kernel does it: nothing outside the listed tiles (plain operations look at `mask_mod` alone)."""
    total = query.shape[1]
    tiles = mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:total, :total]
    own = mask.mask_mod

    def within(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return tiles[q, k] & own(b, h, q, k)

    return ours.attend_plainly(query, key, value, within, scale).to(query.dtype)


def test_a_cpu_keeps_its_own_attention() -> None:
    plan = build_plan(FORESTS["group"], 4)
    assert isinstance(plan, ForestPlan)
    total = FORESTS["group"].num_tokens
    plan.attend(0, torch.randn(4, total, 16), torch.randn(2, total, 16), torch.randn(2, total, 16), 0.25, None)
    assert not plan._masks
