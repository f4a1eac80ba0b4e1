"""All layers of a decoding step as one call (`polm_decode_layers` of `decode.cpp`), for decoders whose code is known.

Of a step of a small model most time goes into the calls between the kernels, not into them. The numbers are those of
the layers themselves, with fewer roundings: a layer's two results are added to the residual stream unrounded.

Shape suffixes: R live rows, D width of the model, W width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polm.models.halved import widen
from polm.models.kernels.install import WINDOWS, is_installed, read_rounded, takes_few_rows
from polm.models.kernels.rows import call_kernel
from polm.rollout.cache import DecodeCache

# Decoders that are: embedding, layers of (norm, attention, sum, norm, feed-forward, sum), norm, and nothing else.
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DecoderStack:
    """A decoder as addresses, a row of `Layer` in `decode.cpp` each; `held` are the tensors that lie there."""

    decoder: Any
    cache: DecodeCache
    addresses: Tensor
    windows: Tensor
    held: tuple[Tensor, ...]
    eps: float
    scale: float

    def run(self, tokens_R: Tensor, positions_R: Tensor) -> Tensor:
        """Final hidden states [R, D] of one token a row, as the decoder gives them; the cache takes what is new."""
        hidden_RD = self.decoder.embed_tokens(tokens_R).float().contiguous()
        cosine, sine = self.decoder.rotary_emb(hidden_RD[None], positions_R[None])
        attention, mlp = self.decoder.layers[0].self_attn, self.decoder.layers[0].mlp
        shape = self.cache.shape
        num_heads = attention.q_proj.weight.shape[0] // shape.head_width
        call_kernel(
            *("polm_decode_layers", hidden_RD, self.addresses, self.windows, positions_R),
            *(cosine[0].contiguous(), sine[0].contiguous(), shape.num_layers, *hidden_RD.shape, num_heads),
            *(shape.num_key_heads, shape.head_width, mlp.up_proj.weight.shape[0], self.cache.length),
            *(self.eps, self.scale),
        )
        out: Tensor = self.decoder.norm(hidden_RD)
        return out


def build_stack(model: PreTrainedModel, cache: DecodeCache) -> DecoderStack | None:
    """The decoder of a model as one call; None where a part of it is not known to be what the call computes.

    To be built, and used, within one sampling in bf16: the addresses are those of the weights' copies.
    """
    decoder = model.get_decoder()
    if not cache.by_kernel or not takes_few_rows(cache.store) or type(decoder).__name__ not in DECODERS:
        return None
    layers = list(decoder.layers)
    norms = [norm for layer in layers for norm in _norms(layer)]
    eps = {norm.variance_epsilon for norm in norms if norm is not None}
    scales = {layer.self_attn.scaling for layer in layers}
    plain = len(layers) == cache.shape.num_layers and all(map(_is_plain, layers))
    if not plain or len(eps) != 1 or len(scales) != 1 or _has_hooks(decoder) or not _turns_whole_heads(decoder, cache):
        return None
    held: list[Tensor] = []
    rows = [_read_layer(layer, cache.store[i], held) for i, layer in enumerate(layers)]
    windows = [WINDOWS[type(layer.self_attn).__name__](layer.self_attn) or 0 for layer in layers]
    return DecoderStack(
        decoder, cache, torch.tensor(rows), torch.tensor(windows), tuple(held), eps.pop(), float(scales.pop())
    )


def _norms(layer: Any) -> tuple[Any, ...]:
    """In the order of the struct; those of heads may be None."""
    heads = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    return layer.input_layernorm, *heads, layer.post_attention_layernorm


def _linears(layer: Any) -> Iterator[Any]:
    for part, names in zip((layer.self_attn, layer.mlp), PROJECTIONS, strict=True):
        yield from (getattr(part, name, None) for name in names)


def _is_plain(layer: Any) -> bool:
    """Whether each part computes what the kernels do: it then has been given them. Norms and biases are read as
    float32."""
    norms, linears = [norm for norm in _norms(layer) if norm is not None], list(_linears(layer))
    vectors = [norm.weight for norm in norms] + [one.bias for one in linears if type(one) is nn.Linear]
    known = [layer.self_attn, layer.mlp, *linears, *norms]
    return (
        all(is_installed(part) for part in known)
        and all(type(part) is nn.Linear for part in linears)
        and all(v.dtype == torch.float32 and v.is_contiguous() for v in vectors if v is not None)
    )


def _has_hooks(decoder: Any) -> bool:
    """Whether anything would be called that the call leaves out; what widens halved embeddings is not left out."""
    for module in decoder.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(hook is not widen for hook in hooks) or (hooks and module is not decoder.embed_tokens):
            return True
    return False


def _turns_whole_heads(decoder: Any, cache: DecodeCache) -> bool:
    """Whether its rotary embedding is as wide as a head, in float32."""
    sample = torch.zeros(1, 1, 1)
    cosine, _ = decoder.rotary_emb(sample, torch.zeros(1, 1, dtype=torch.int64))
    return bool(cosine.shape == (1, 1, cache.shape.head_width) and cosine.dtype == torch.float32)


def _read_layer(layer: Any, store: Tensor, held: list[Tensor]) -> list[int]:
    """The addresses of one layer's tensors and of its keys and values, `store`; the tensors go to `held`."""
    norms = [None if norm is None else norm.weight for norm in _norms(layer)]
    linears = list(_linears(layer))
    weights = [read_rounded(linear.weight).contiguous() for linear in linears]
    tensors = [*norms, *weights, *(linear.bias for linear in linears), store[0], store[1]]
    held += [tensor for tensor in tensors if tensor is not None]
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
