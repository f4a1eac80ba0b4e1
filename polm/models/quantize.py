"""Frozen weights in 4 bits. The one place that imports `bitsandbytes`, an optional dependency that needs CUDA."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from polm.errors import UserError


def build_quantization(kind: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `nf4`: 4-bit NormalFloat with double quantization, products in bf16 (QLoRA,
    arXiv 2305.14314, section 3). Raises UserError where it cannot run."""
    if not torch.cuda.is_available():
        raise UserError(
            f"adapter.quantize: {kind} needs a CUDA GPU, and this machine has none; leave quantize out: the frozen "
            "base then stays in float32"
        )
    try:
        import bitsandbytes  # noqa: F401 (transformers uses it by its name)
    except ImportError as error:
        raise UserError(
            f"adapter.quantize: {kind} needs `bitsandbytes`, which is not installed: pip install bitsandbytes"
        ) from error
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
