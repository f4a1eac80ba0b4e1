"""The row kernels as differentiable functions of tensors (`rows.cpp`); `load_library` must have found them.

Activations are float32 or bfloat16, weights float32, all on the CPU; inside everything is float32. Against the layers
of `transformers` under autocast a bf16 result has fewer roundings on its way.

Shape suffixes: T rows, H query heads, J key heads, D width, F width of the feed-forward, N targets, V vocabulary,
K ids a target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polm.models.kernels.build import load_library


def call_kernel(name: str, *arguments: Tensor | float | int | None) -> None:
    """Call a kernel on all of torch's threads. Tensors go as the addresses of their numbers, so they are contiguous."""
    library = load_library()
    assert library is not None, "the row kernels are called without having been found"
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(library, name)(*raw, torch.get_num_threads())


def _is_half(tensor: Tensor) -> int:
    assert tensor.dtype in (torch.float32, torch.bfloat16), tensor.dtype
    return int(tensor.dtype == torch.bfloat16)


def _norm_forward(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, width = x_TD.numel() // x_TD.shape[-1], x_TD.shape[-1]
    out_TD, rstd_T = torch.empty(x_TD.shape, dtype=dtype), torch.empty(rows)
    call_kernel("polm_norm_forward", x_TD, weight_D, eps, out_TD, rstd_T, rows, width, _is_half(out_TD))
    return out_TD, rstd_T


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x_TD = x_TD.contiguous()
        out_TD, rstd_T = _norm_forward(x_TD, weight_D, eps, dtype)
        ctx.save_for_backward(x_TD, weight_D, rstd_T)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, rstd_T = ctx.saved_tensors
        grad_TD = grads[0].contiguous()
        grad_x_TD, grad_weight_D = torch.empty_like(x_TD), torch.empty_like(weight_D)
        sizes = len(rstd_T), x_TD.shape[-1], _is_half(grad_TD)
        call_kernel("polm_norm_backward", grad_TD, x_TD, weight_D, rstd_T, grad_x_TD, grad_weight_D, *sizes)
        return grad_x_TD, grad_weight_D, None, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last axis of x (float32), written in `dtype` (arXiv 1910.07467)."""
    if not torch.is_grad_enabled():  # a step of decoding notices what autograd costs, here and below
        return _norm_forward(x_TD.contiguous(), weight_D, eps, dtype)[0]
    out: Tensor = _Norm.apply(x_TD, weight_D, eps, dtype)  # type: ignore[no-untyped-call]
    return out


def _rotate_forward(
    x_THD: Tensor, weight_D: Tensor | None, eps: float, cosine_TD: Tensor, sine_TD: Tensor
) -> tuple[Tensor, Tensor]:
    out_THD, rstd_TH = torch.empty_like(x_THD), torch.empty(x_THD.shape[:2])
    sizes = *x_THD.shape, _is_half(x_THD)
    call_kernel("polm_rotate_forward", x_THD, weight_D, eps, cosine_TD, sine_TD, out_THD, rstd_TH, *sizes)
    return out_THD, rstd_TH


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_THD: Tensor, weight_D: Tensor | None, eps: float, cosine_TD: Tensor, sine_TD: Tensor
    ) -> Tensor:
        x_THD = x_THD.contiguous()
        out_THD, rstd_TH = _rotate_forward(x_THD, weight_D, eps, cosine_TD, sine_TD)
        ctx.save_for_backward(x_THD, weight_D, cosine_TD, sine_TD, rstd_TH)
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_THD, weight_D, cosine_TD, sine_TD, rstd_TH = ctx.saved_tensors
        grad_THD = grads[0].contiguous()
        grad_x_THD = torch.empty_like(x_THD)
        grad_weight_D = None if weight_D is None else torch.empty_like(weight_D)
        tensors = grad_THD, x_THD, weight_D, cosine_TD, sine_TD, rstd_TH, grad_x_THD, grad_weight_D
        call_kernel("polm_rotate_backward", *tensors, *x_THD.shape, _is_half(x_THD))
        return grad_x_THD, grad_weight_D, None, None, None


def norm_and_rotate(x_THD: Tensor, weight_D: Tensor | None, eps: float, cosine_TD: Tensor, sine_TD: Tensor) -> Tensor:
    """RMSNorm of each head (none without a weight), then its two halves turned as the rotary embedding says.

    cosine, sine [T, D] float32, as `transformers` makes them (arXiv 2104.09864).
    """
    if not torch.is_grad_enabled():
        return _rotate_forward(x_THD.contiguous(), weight_D, eps, cosine_TD, sine_TD)[0]
    out: Tensor = _Rotate.apply(x_THD, weight_D, eps, cosine_TD, sine_TD)  # type: ignore[no-untyped-call]
    return out


def rotate_heads(
    query_THD: Tensor,
    key_TJD: Tensor,
    norms: tuple[nn.Module | None, nn.Module | None],
    cosine_TD: Tensor,
    sine_TD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Query and key after the norms of single heads, if any, and the rotary embedding."""
    query, key = (
        norm_and_rotate(x, None, 0.0, cosine_TD, sine_TD)
        if norm is None
        else norm_and_rotate(x, norm.weight, norm.variance_epsilon, cosine_TD, sine_TD)  # type: ignore[arg-type]
        for x, norm in zip((query_THD, key_TJD), norms, strict=True)
    )
    return query, key


def _swiglu_forward(gate_TF: Tensor, upper_TF: Tensor) -> Tensor:
    out_TF = torch.empty_like(gate_TF)
    call_kernel("polm_swiglu_forward", gate_TF, upper_TF, out_TF, gate_TF.numel(), _is_half(gate_TF))
    return out_TF


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, upper_TF: Tensor) -> Tensor:
        gate_TF, upper_TF = gate_TF.contiguous(), upper_TF.contiguous()
        out_TF = _swiglu_forward(gate_TF, upper_TF)
        ctx.save_for_backward(gate_TF, upper_TF)
        return out_TF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, upper_TF = ctx.saved_tensors
        grad_TF = grads[0].contiguous()
        grad_gate_TF, grad_upper_TF = torch.empty_like(gate_TF), torch.empty_like(upper_TF)
        tensors = grad_TF, gate_TF, upper_TF, grad_gate_TF, grad_upper_TF
        call_kernel("polm_swiglu_backward", *tensors, gate_TF.numel(), _is_half(gate_TF))
        return grad_gate_TF, grad_upper_TF


def swiglu(gate_TF: Tensor, upper_TF: Tensor) -> Tensor:
    """silu(gate) * upper (arXiv 2002.05202)."""
    if not torch.is_grad_enabled():
        return _swiglu_forward(gate_TF.contiguous(), upper_TF.contiguous())
    out: Tensor = _SwiGLU.apply(gate_TF, upper_TF)  # type: ignore[no-untyped-call]
    return out


def head_forward(
    logits_NV: Tensor, ids_NK: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log-probabilities of the ids [N, K], log of the sum of exponentials [N], entropy [N] or None), float32."""
    rows, vocab = logits_NV.shape
    logprobs_NK, total_N = torch.empty(ids_NK.shape), torch.empty(rows)
    entropy_N = torch.empty(rows) if with_entropy else None
    sizes = rows, vocab, ids_NK.shape[1], _is_half(logits_NV)
    call_kernel("polm_head_forward", logits_NV, ids_NK, 1.0 / temperature, logprobs_NK, total_N, entropy_N, *sizes)
    return logprobs_NK, total_N, entropy_N


def head_backward_(
    logits_NV: Tensor,
    ids_NK: Tensor,
    temperature: float,
    total_N: Tensor,
    entropy_N: Tensor | None,
    grad_logprobs_NK: Tensor,
    grad_entropy_N: Tensor | None,
) -> None:
    """Turn the logits into their gradient, in place; `total_N` and `entropy_N` are those of `head_forward`.

    The logits may be those of a part of the vocabulary, with ids counted from its beginning; others may lie outside.
    """
    sizes = *logits_NV.shape, ids_NK.shape[1], _is_half(logits_NV)
    tensors = total_N, entropy_N, grad_logprobs_NK, grad_entropy_N
    call_kernel("polm_head_backward", logits_NV, ids_NK, 1.0 / temperature, *tensors, *sizes)


def head_gradient_(logits_NV: Tensor, ids_NK: Tensor, temperature: float, grad_logprobs_NK: Tensor) -> Tensor:
    """`head_forward` and `head_backward_` in one pass: log-probabilities of the ids [N, K], float32; the logits become
    their gradient, in place."""
    logprobs_NK = torch.empty(ids_NK.shape)
    sizes = *logits_NV.shape, ids_NK.shape[1], _is_half(logits_NV)
    tensors = logprobs_NK, grad_logprobs_NK
    call_kernel("polm_head_gradient", logits_NV, ids_NK, 1.0 / temperature, *tensors, *sizes)
    return logprobs_NK
