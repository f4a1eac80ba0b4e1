"""Frozen weights in 4 bits. The one place that imports `bitsandbytes`, an optional dependency (CUDA, or a CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from polm.errors import UserError

PACKS = "support_avx512bf16_for_cpu"  # attribute of a layer in 4 bits


def build_quantization(kind: str, skip: Sequence[str] | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `nf4`: 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314,
    section 3), products in bf16 on a GPU and in float32 on a CPU. Layers named in `skip` stay as they are; None = the
    output head does. Raises UserError where it cannot run."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"adapter.quantize: {kind} needs `bitsandbytes`, which is not installed: pip install bitsandbytes; or "
            "leave quantize out: the frozen base then stays in float32"
        ) from error
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    known = set(getattr(bitsandbytes, "supported_torch_devices", {"cuda"}))
    if device not in known:
        raise UserError(
            f"adapter.quantize: {kind} runs on {', '.join(sorted(known))} with the bitsandbytes that is installed, and "
            f"this machine has {device} only; update bitsandbytes, or leave quantize out"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
        llm_int8_skip_modules=list(skip) if skip is not None else None,  # of 4 bits too, despite its name
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device() if on_gpu else "cpu"}}


def keep_differentiable(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from packing the weights anew at the first forward in eval mode, as it does on CPUs with
    AVX512-BF16: through packed weights no gradient flows, also when training begins afterwards."""
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
