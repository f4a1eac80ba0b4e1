"""The compiled attention against the batched products in float64, which are held against the models' own forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polm.models.forest_attention import _ForestAttention, build_plan
from polm.models.kernels.attention import attend_blocks, can_attend
from polm.models.kernels.build import explain_absence, has_pairs
from polm.tokens import Tree, build_completions, build_document, collate

pytestmark = pytest.mark.skipif(
    not has_pairs(), reason=explain_absence() or "this processor has no AVX512-BF16, or has AMX besides"
)


def draw_ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) % 89 + 1


FORESTS: dict[str, list[Tree]] = {
    "documents around the size of a block": [build_document(draw_ids(n)) for n in (20, 1, 130, 64, 65, 7)],
    "longer than a stretch of keys": [build_document(draw_ids(1100))],
    "prompts with answers": [
        build_completions(draw_ids(50), [draw_ids(n) for n in (10, 70, 3, 129)]),
        build_document(draw_ids(33)),
        build_completions(draw_ids(5), [draw_ids(64), draw_ids(1)]),
    ],
}


@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(6, 2, 64), (3, 3, 16), (4, 1, 48)])
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize(("virtual", "spare"), [(0, 0), (0, 9), (3, 0)])
def test_values_and_gradients(
    forest: str, heads: int, key_heads: int, width: int, window: int | None, virtual: int, spare: int
) -> None:
    torch.set_num_threads(2)
    batch = collate(FORESTS[forest])
    rows = virtual + batch.num_tokens + spare
    torch.manual_seed(0)
    query, grad = torch.randn(2, rows, heads, width).bfloat16()
    key, value = torch.randn(2, rows, key_heads, width).bfloat16()
    if spare:  # nobody reads what stands there
        grad[-spare:] = 0.0
    plan = build_plan(batch, heads, spare, virtual)
    mine = [x.clone().requires_grad_() for x in (query, key, value)]
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    assert can_attend(query, key)
    found = attend_blocks(*mine, plan.kernel_blocks, width**-0.5, window)
    wanted = _ForestAttention.apply(*exact, plan, width**-0.5, window, True)
    pairs = [(found, wanted)]
    pairs += zip(torch.autograd.grad(found, mine, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True)
    for one, other in pairs:
        one, other = one[: rows - spare].detach().double(), other[: rows - spare].detach()
        assert float((one - other).norm()) <= 4e-3 * float(other.norm())  # bf16 has 8 bits: about 2e-3


def test_the_result_does_not_depend_on_what_is_beside_it() -> None:
    """A tree alone and among others: the same bits, values and gradients."""
    torch.manual_seed(1)
    tree, other = FORESTS["prompts with answers"][0], build_document(draw_ids(40))
    alone, among = build_plan(collate([tree]), 4), build_plan(collate([other, tree, other]), 4)
    num = collate([tree]).num_tokens
    query, key, value, grad = (torch.randn(num + 80, heads, 32).bfloat16() for heads in (4, 2, 2, 4))
    found = []
    for plan, part in ((alone, slice(40, 40 + num)), (among, slice(None))):
        given = [x[part].clone().requires_grad_() for x in (query, key, value)]
        out = attend_blocks(*given, plan.kernel_blocks, 0.2, None)
        found.append([out, *torch.autograd.grad(out, given, grad[part])])
    for one, other_one in zip(*found, strict=True):
        assert torch.equal(one, other_one[40 : 40 + num])


def test_threads_do_not_change_the_bits() -> None:
    plan = build_plan(collate(FORESTS["prompts with answers"]), 4)
    torch.manual_seed(2)
    rows = len(plan.layout.positions)
    query, key, value, grad = (torch.randn(rows, heads, 32).bfloat16() for heads in (4, 2, 2, 4))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        given = [x.clone().requires_grad_() for x in (query, key, value)]
        found.append(torch.autograd.grad(attend_blocks(*given, plan.kernel_blocks, 0.2, None), given, grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nan_stays_nan() -> None:
    plan = build_plan(collate([build_document(draw_ids(20))]), 2)
    query = torch.ones(20, 2, 16).bfloat16()
    query[3, 1, 0] = float("nan")
    out = attend_blocks(
        query, torch.ones(20, 2, 16).bfloat16(), torch.ones(20, 2, 16).bfloat16(), plan.kernel_blocks, 1.0, None
    )
    assert out[3, 1].isnan().all()
    assert not out[3, 0].isnan().any()
