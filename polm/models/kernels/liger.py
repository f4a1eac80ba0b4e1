"""The row kernels of a GPU, from liger-kernel (Triton; the extra `gpu`), in the form of `rows.py`.

They are held against plain operations on that GPU before they are used; where they are absent or differ, the layers'
own code runs. Its cross-entropy is not taken: it gives log-probabilities in the dtype of the logits, of one token a
row, without entropy, and waits for the device.

Shape suffixes: T rows, H query heads, J key heads, D width, F width of the feed-forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from polm.models.kernels.build import explain_switch
from polm.models.kernels.proof import explain_gap, measure_gap, note

MANY_ROWS = 1 << 15  # from so many on it takes blocks of rows
NORM_STYLE = "llama"  # the normalised row is rounded to its dtype, then weighed: as the layers of transformers do


@dataclass(frozen=True)
class _Functions:
    """liger-kernel's differentiable functions."""

    norm: Callable[..., Tensor]
    rope: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[..., Tensor]


@functools.cache
def _load() -> _Functions:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return _Functions(LigerRMSNormFunction.apply, LigerRopeFunction.apply, LigerSiLUMulFunction.apply)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last axis, written in `dtype` (arXiv 1910.07467)."""
    in_place = False  # in the backward pass: the residual stream's gradient is still read
    return _load().norm(x_TD, weight_D, eps, 0.0, NORM_STYLE, in_place, None).to(dtype)


def rotate_heads(
    query_THD: Tensor,
    key_TJD: Tensor,
    norms: tuple[nn.Module | None, nn.Module | None],
    cosine_TD: Tensor,
    sine_TD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Query and key after the norms of single heads, if any, and the rotary embedding; what is given is overwritten."""
    heads = [query_THD, key_TJD]
    for place, norm in enumerate(norms):
        if norm is not None:
            heads[place] = rms_norm(heads[place], norm.weight, norm.variance_epsilon, heads[place].dtype)  # type: ignore[arg-type]
    query, key = (x.transpose(0, 1)[None] for x in heads)
    query, key = _load().rope(query, key, cosine_TD[None], sine_TD[None])
    return query[0].transpose(0, 1), key[0].transpose(0, 1)


def swiglu(gate_TF: Tensor, upper_TF: Tensor) -> Tensor:
    """silu(gate) * upper (arXiv 2002.05202)."""
    return _load().silu_mul(gate_TF, upper_TF)


@functools.cache
def explain_liger_absence(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why liger-kernel is not taken on this device for activations of this dtype; None where it is."""
    name = f"liger-kernel ({str(dtype).removeprefix('torch.')})"
    if (off := explain_switch()) is not None:
        return note(name, off)
    if find_spec("liger_kernel") is None:
        return note(name, "not installed; install polm[gpu]")
    return explain_gap(name, functools.partial(_measure, device, dtype), dtype)


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The largest gap of the kernels; the norm has another one for many narrow rows, and one for frozen weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weight, angles = 1.0 + 0.2 * draw(32), draw(9, 16)
    angles = torch.cat([angles, angles], dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    turn = functools.partial(rotate_heads, norms=(None, None), cosine_TD=cosine, sine_TD=sine)
    turn_plainly = functools.partial(_rotate_plainly, cosine_TD=cosine, sine_TD=sine)
    norm = functools.partial(rms_norm, eps=1e-6, dtype=dtype)
    frozen, frozen_plainly = functools.partial(norm, weight_D=weight), functools.partial(_norm_plainly, weight_D=weight)
    return max(
        measure_gap(norm, _norm_plainly, [draw(9, 32).to(dtype), weight]),
        measure_gap(norm, _norm_plainly, [draw(MANY_ROWS, 32).to(dtype), weight]),
        measure_gap(frozen, frozen_plainly, [draw(9, 32).to(dtype)]),
        measure_gap(turn, turn_plainly, [draw(9, 4, 32).to(dtype), draw(9, 2, 32).to(dtype)]),
        measure_gap(swiglu, _swiglu_plainly, [draw(9, 48).to(dtype), draw(9, 48).to(dtype)]),
        key=lambda gap: float("inf") if gap != gap else gap,
    )


def _norm_plainly(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    x = x_TD.float()
    return weight_D * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x_TD.dtype)


def _rotate_plainly(query_THD: Tensor, key_TJD: Tensor, cosine_TD: Tensor, sine_TD: Tensor) -> list[Tensor]:
    half = query_THD.shape[-1] // 2
    return [
        x * cosine_TD[:, None] + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sine_TD[:, None]
        for x in (query_THD, key_TJD)
    ]


def _swiglu_plainly(gate_TF: Tensor, upper_TF: Tensor) -> Tensor:
    return nn.functional.silu(gate_TF) * upper_TF
