"""The compiled step of decoding (`decode.cpp`): products of a few rows, and attention over each row's past.

bfloat16 on CPUs that multiply pairs of it; sums are float32. `has_pairs` must have said yes.

Shape suffixes: R rows, D depth of a product, N columns, H query heads, J key heads, W head width, S slots, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polm.models.kernels.build import has_pairs
from polm.models.kernels.rows import call_kernel

# Twice as fast as the library's product and more at up to 16 rows, as fast at 64; and it takes no memory, where that
# one compiles and keeps code for each number of rows, and packs all weights anew in each call. With it, all layers are
# one call, and the generator was the faster for that at 256 rows too (its own limit).
FEW_ROWS = 256


def multiply_few_rows(x_RD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x weight^T + bias in `dtype` (bfloat16 or float32); x and weight bfloat16, the bias float32. x may have more axes
    in front."""
    assert x_RD.dtype == weight_ND.dtype == torch.bfloat16, (x_RD.dtype, weight_ND.dtype)
    assert bias_N is None or bias_N.dtype == torch.float32, bias_N.dtype
    x_RD, depth = x_RD.contiguous(), x_RD.shape[-1]
    out = torch.empty((*x_RD.shape[:-1], len(weight_ND)), dtype=dtype)
    sizes = x_RD.numel() // depth, depth, len(weight_ND), int(dtype == torch.bfloat16)
    call_kernel("polm_few_rows", x_RD, weight_ND.contiguous(), bias_N, out, *sizes)
    return out


def can_attend(width: int) -> bool:
    """Whether `attend_past` is there, for heads of this width."""
    return width % 32 == 0 and has_pairs()


def attend_past(
    query_RHW: Tensor,
    key_RJW: Tensor,
    value_RJW: Tensor,
    keys_SJLW: Tensor,
    values_SJLW: Tensor,
    positions_R: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Put each row's key and value at its position in its slot (row r is slot r), and attend to all up to there.

    All bfloat16 and contiguous, positions int64. Returns [R, H, W], bfloat16.
    """
    assert all(x.dtype == torch.bfloat16 for x in (query_RHW, key_RJW, value_RJW, keys_SJLW, values_SJLW))
    out_RHW = torch.empty_like(query_RHW)
    rows, heads, width = query_RHW.shape
    sizes = rows, heads, *keys_SJLW.shape[1:2], width, keys_SJLW.shape[2], window or 0
    tensors = query_RHW, key_RJW, value_RJW, keys_SJLW, values_SJLW, positions_R, out_RHW
    call_kernel("polm_decode_attention", *tensors, *sizes, scale)
    return out_RHW
