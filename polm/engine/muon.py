"""Muon with its products batched over matrices of one shape, in float32 unless bf16 is asked for.

The same update as `torch.optim.Muon` (Jordan et al. 2024, kellerjordan.github.io/posts/muon), whose Newton-Schulz
iteration is always in bf16, one matrix at a time: on a CPU without bf16 products that is slower than all the rest.

Shape suffixes: B matrices of one shape, R rows, C columns (R <= C inside the iteration).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, the steepest at zero that stays near one
STEPS = 5
EPSILON = 1e-7
# From this ratio of the sides on, in float32, the iteration runs on the small side only.
WIDE = 2


def compute_orthogonal(matrices_BRC: Tensor, *, bf16: bool) -> Tensor:
    """Each matrix with its singular values pushed towards one (about 0.7 to 1.2), [B, R, C].

    X <- (a + b A + c A A) X with A = X X^T, five times, from X divided by its Frobenius norm.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices_BRC.shape[1] > matrices_BRC.shape[2]
    x_BRC = matrices_BRC.to(torch.bfloat16 if bf16 else torch.float32)
    if is_tall:
        x_BRC = x_BRC.transpose(1, 2)
    x_BRC = x_BRC / x_BRC.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    if not bf16 and x_BRC.shape[2] >= WIDE * x_BRC.shape[1]:
        x_BRC = _iterate_gram(x_BRC)
        return x_BRC.transpose(1, 2) if is_tall else x_BRC
    for _ in range(STEPS):
        gram_BRR = torch.bmm(x_BRC, x_BRC.transpose(1, 2))
        update_BRR = torch.baddbmm(gram_BRR, gram_BRR, gram_BRR, beta=b, alpha=c)
        x_BRC = torch.baddbmm(x_BRC, update_BRR, x_BRC, beta=a)
    return x_BRC.transpose(1, 2) if is_tall else x_BRC


def _iterate_gram(x_BRC: Tensor) -> Tensor:
    """The same iteration on the small side: each factor Q = a + b A + c A A is a polynomial of the first A, so all of
    them commute, the next A is Q A Q, and X is multiplied once, by their product."""
    a, b, c = COEFFICIENTS
    gram_BRR = torch.bmm(x_BRC, x_BRC.transpose(1, 2))
    product_BRR = None
    for step in range(STEPS):
        factor_BRR = torch.baddbmm(gram_BRR, gram_BRR, gram_BRR, beta=b, alpha=c)
        factor_BRR.diagonal(dim1=1, dim2=2).add_(a)
        product_BRR = factor_BRR if product_BRR is None else torch.bmm(factor_BRR, product_BRR)
        if step < STEPS - 1:
            gram_BRR = torch.bmm(factor_BRR, torch.bmm(gram_BRR, factor_BRR))
    assert product_BRR is not None
    return torch.bmm(product_BRR, x_BRC)


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead, made orthogonal, scaled by sqrt(max(1, rows / columns)).

    One matrix's result does not depend on which others are in the optimizer, up to the order of float sums.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, bf16: bool = False
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._bf16 = bf16
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.ndim == 2, parameter.shape

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not supported (the engine computes the gradients)."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for (shape, _), parameters in by_shape.items():
                look_ahead = torch.stack([self._advance(p, group["momentum"]) for p in parameters])
                directions = compute_orthogonal(look_ahead, bf16=self._bf16)
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.to(parameter.dtype), alpha=-rate)

    def _advance(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Move the momentum on and look ahead along it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)
