"""The matrices of a model that is only read, in bf16 alone.

Under bf16 autocast every product reads a bf16 copy of its weights, so that a model whose weights are float32 takes 6
bytes a weight. Where nothing is trained, 2 do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polm.errors import ModelError
from polm.models.mapped import find_clean_mappings, release_pages
from polm.models.virtual import read_virtual


@torch.no_grad()
def halve_matrices(model: PreTrainedModel) -> int:
    """Round the float32 matrices of linear layers and embeddings to bf16, in place; returns how many.

    Products under bf16 autocast keep their bits: it rounds alike. Norms, biases and the residual stream stay float32;
    what enters the stream, the embeddings, is rounded once (not at all where the checkpoint is in bf16). Embeddings
    that compute something (Gemma's are scaled, in the dtype of the weight) stay as they are, and a head that is tied to
    them. The weights then take no gradient, and tokens are read under bf16 autocast only (ModelError). A model with
    virtual tokens is left as it is.
    """
    if read_virtual(model) is not None:
        return 0
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) or type(module) is nn.Embedding]
    matrices = {id(layer.weight): layer.weight for layer in layers if layer.weight.dtype == torch.float32}
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:
        matrices.pop(id(embedding.weight), None)
    if not matrices:
        return 0
    model.requires_grad_(False)
    mappings = find_clean_mappings()
    for weight in model.parameters():  # a tied one once
        # All are copied: one that stayed would keep the whole file mapped.
        before = weight.data
        weight.data = before.to(torch.bfloat16) if id(weight) in matrices else before.clone()
        release_pages(before, mappings)
    embedding.register_forward_hook(widen)
    return len(matrices)


def widen(module: nn.Module, arguments: Any, rounded: Tensor) -> Tensor:
    """A forward hook of halved embeddings: the residual stream that they begin is float32."""
    del module, arguments
    kind = rounded.device.type
    if not (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16):
        raise ModelError(
            "this model's matrices are kept in bf16 (halve_matrices), and it was asked in float32; pass bf16"
        )
    return rounded.float()
