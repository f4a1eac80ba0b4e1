"""Each kernel against the formula in float64, values and gradients, in float32 and in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from polm.models.kernels.build import explain_absence
from polm.models.kernels.rows import head_backward_, head_forward, norm_and_rotate, rms_norm, swiglu

pytestmark = pytest.mark.skipif(explain_absence() is not None, reason=f"no row kernels: {explain_absence()}")
DTYPES = (torch.float32, torch.bfloat16)
# 97 rows of 40 stay in one thread, 300 rows of 384 are split among two.
SIZES = ((97, 40), (300, 384))


def compare(
    compute: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Value and gradients of `compute` within the rounding of `dtype` of those of `formula` in float64."""
    torch.set_num_threads(2)
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    found, wanted = compute(*mine), formula(*exact)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5)).to(found.dtype)
    pairs = [(found, wanted)]
    pairs += zip(torch.autograd.grad(found, mine, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        tolerance = 4e-6 if dtype == torch.float32 else 2.0**-8
        # Of the largest number: a sum's small results carry the rounding of its large terms.
        gap = float((one.detach().double() - other.detach()).abs().max())
        assert gap <= tolerance * float(other.detach().abs().max())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norm_is_its_formula(dtype: torch.dtype, size: tuple[int, int]) -> None:
    inputs = draw(*size), 1.0 + 0.3 * draw(size[1], seed=1)
    compare(lambda x, w: rms_norm(x, w, 1e-3, dtype), lambda x, w: norm(x, w, 1e-3), inputs, dtype)


def test_norm_of_a_row_by_hand() -> None:
    """x = (3, 4), mean square 12.5: x / sqrt(12.5), times (1, 2)."""
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0, torch.float32)
    assert out[0].tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("width", [6, 64])
def test_rotation_is_its_formula(dtype: torch.dtype, with_norm: bool, width: int) -> None:
    angles = draw(50, width // 2, seed=2)
    cosine, sine = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def formula(x: Tensor, weight: Tensor | None = None) -> Tensor:
        x = x if weight is None else norm(x, weight, 1e-6)
        turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return x * cosine.double()[:, None] + turned * sine.double()[:, None]

    def compute(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return norm_and_rotate(x, weight, 1e-6, cosine, sine)

    inputs = [draw(50, 5, width).to(dtype), 1.0 + 0.3 * draw(width, seed=1)]
    compare(compute, formula, inputs if with_norm else inputs[:1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_is_its_formula(dtype: torch.dtype, size: tuple[int, int]) -> None:
    inputs = (4 * draw(*size)).to(dtype), draw(*size, seed=1).to(dtype)
    compare(swiglu, lambda gate, upper: gate * torch.sigmoid(gate) * upper, inputs, dtype)


def test_swiglu_far_from_zero() -> None:
    """silu(100) = 100 and silu(-100) = 0 within float32; their slopes are 1 and 0."""
    gate = torch.tensor([100.0, -100.0], requires_grad=True)
    out = swiglu(gate, torch.ones(2))
    (slope,) = torch.autograd.grad(out.sum(), gate)
    assert out.tolist() == pytest.approx([100.0, 0.0], abs=1e-30)
    assert slope.tolist() == pytest.approx([1.0, 0.0], abs=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 33), (40, 9000)])
def test_head_is_its_formula(dtype: torch.dtype, with_entropy: bool, rows: int, vocab: int) -> None:
    """Log-probabilities, entropy and the logits' gradient, with one id twice in a row."""
    torch.set_num_threads(2)
    logits = (3 * draw(rows, vocab)).to(dtype)
    ids = torch.randint(0, vocab, (rows, 3), generator=torch.Generator().manual_seed(3))
    ids[2, 1] = ids[2, 0]
    grad, grad_entropy = draw(rows, 3, seed=4), draw(rows, seed=5) if with_entropy else torch.zeros(rows)
    exact = logits.double().requires_grad_()
    logp = torch.log_softmax(exact / 0.7, -1)
    own = -(logp.exp() * logp).sum(-1)
    (wanted,) = torch.autograd.grad((logp.gather(1, ids) * grad).sum() + (own * grad_entropy).sum(), exact)

    logprobs, total, entropy = head_forward(logits, ids, 0.7, with_entropy)
    torch.testing.assert_close(logprobs.double(), logp.gather(1, ids), rtol=1e-5, atol=1e-5)
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), own, rtol=1e-5, atol=1e-5)
    head_backward_(logits, ids, 0.7, total, entropy, grad, grad_entropy if with_entropy else None)
    tolerance = 4e-6 if dtype == torch.float32 else 2.0**-8
    assert float((logits.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_head_by_parts_of_the_vocabulary() -> None:
    """Three parts of the logits, each with the ids counted from its beginning, give the gradient of the whole."""
    logits, ids = 3 * draw(5, 30), torch.tensor([[0, 9], [10, 29], [19, 19], [20, 3], [11, 12]])
    grad, grad_entropy = draw(5, 2, seed=1), draw(5, seed=2)
    _, total, entropy = head_forward(logits, ids, 0.9, True)
    parts = [logits[:, first : first + 10].contiguous() for first in (0, 10, 20)]
    for first, part in zip((0, 10, 20), parts, strict=True):
        head_backward_(part, ids - first, 0.9, total, entropy, grad, grad_entropy)
    head_backward_(logits, ids, 0.9, total, entropy, grad, grad_entropy)
    assert torch.equal(torch.cat(parts, 1), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_stay_so(dtype: torch.dtype) -> None:
    """The loop stops at a loss that is NaN: no kernel may turn one into a number."""
    bad = torch.full((3, 8), 1.0)
    bad[1, 2] = float("nan")
    assert rms_norm(bad, torch.ones(8), 1e-6, dtype)[1].isnan().all()
    assert swiglu(bad.to(dtype), bad.to(dtype))[1, 2].isnan()
    logprobs, _, _ = head_forward(bad.to(dtype), torch.zeros(3, 1, dtype=torch.int64), 1.0, False)
    assert logprobs.isnan().flatten().tolist() == [False, True, False]
