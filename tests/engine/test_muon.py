"""Muon against its formula in float64 and against torch's own, matrix by matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from polm.engine.muon import COEFFICIENTS, STEPS, Muon, compute_orthogonal

SHAPES = [(8, 8), (24, 8), (8, 8), (8, 20)]


def iterate(matrix: Tensor) -> Tensor:
    """The iteration on singular values, in float64: it leaves the singular vectors alone."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def build_matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], update: int) -> None:
    generator = torch.Generator().manual_seed(update + 1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 20)])
def test_singular_values_follow_the_quintic(shape: tuple[int, int]) -> None:
    matrices = torch.randn((3, *shape), generator=torch.Generator().manual_seed(1))
    got = compute_orthogonal(matrices, bf16=False)
    for mine, matrix in zip(got, matrices, strict=True):
        torch.testing.assert_close(mine.double(), iterate(matrix), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 60), (60, 12)])
def test_singular_values_near_zero_on_the_small_side(shape: tuple[int, int]) -> None:
    """Of a matrix of rank 3 with a little noise: the iteration on the small side squares the singular values."""
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    matrix = low + 1e-4 * torch.randn(shape, generator=generator)
    got = compute_orthogonal(matrix[None], bf16=False)[0].double()
    expected = iterate(matrix)
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_a_zero_gradient_stays_zero() -> None:
    assert compute_orthogonal(torch.zeros(1, 4, 4), bf16=False).abs().max() == 0


def test_one_update_by_hand() -> None:
    (matrix, *_) = parameters = build_matrices()[1:2]
    before = matrix.detach().clone()
    set_gradients(parameters, 0)
    assert matrix.grad is not None
    momentum = 0.05 * matrix.grad  # lerp from zero by 1 - 0.95
    ahead = 0.05 * matrix.grad + 0.95 * momentum
    Muon(parameters, lr=0.1, momentum=0.95, weight_decay=0.2).step()
    expected = before * (1 - 0.1 * 0.2) - 0.1 * math.sqrt(24 / 8) * iterate(ahead).float()
    torch.testing.assert_close(matrix.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bf16", "tolerance"), [(True, 1e-6), (False, 0.02)])
def test_parity_with_torch(bf16: bool, tolerance: float) -> None:
    """The same bf16 products within rounding of their batches; float32 ones within bf16's error of them."""
    ours, theirs = build_matrices(), build_matrices()
    mine = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1, bf16=bf16)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    for update in range(5):
        set_gradients(ours, update)
        set_gradients(theirs, update)
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_a_matrix_without_gradient_is_left_alone() -> None:
    parameters = build_matrices()
    set_gradients(parameters, 0)
    parameters[0].grad = None
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.5)
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]
    assert changed == [False, True, True, True]
    assert parameters[0] not in optimizer.state
