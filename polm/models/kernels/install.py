"""Give the layers of a `transformers` decoder the row kernels, without touching its code.

A layer's `forward` is replaced on the instance; the new one takes the kernels that `choose_kernels` gives it
(`rows.py` on a CPU, `liger.py` on a GPU) and the layer's own code where it gives none (float32 training, no compiler).
Only layers whose code is known are replaced: the classes named below, and norms and feed-forwards that are found to
compute what the kernels compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polm.models.forest_attention import forest_attention
from polm.models.kernels import liger, rows
from polm.models.kernels.build import has_pairs, load_library
from polm.models.kernels.decode import FEW_ROWS, multiply_few_rows

# Attention classes whose code is q, k and v projections, norms of single heads where there are any, and the rotary
# embedding of whole heads; and where each has the width of its window. (OLMo-2 has norms over all heads at once, Gemma
# norms of another form, SmolLM3 layers without positions.)
WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda _: None,
    "MistralAttention": lambda module: getattr(module.config, "sliding_window", None),
    "Qwen2Attention": lambda module: module.sliding_window,
    "Qwen3Attention": lambda module: module.sliding_window,
}
# Within `kernels_while_sampling`: weights and their bf16 copies, by the id of the weight. None outside.
_sampling: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("kernels_while_sampling", default=None)


@contextlib.contextmanager
def kernels_while_sampling() -> Iterator[None]:
    """Let float32 take the kernels too, and bf16 those of decoding: the generator's bits are nobody's yardstick, unlike
    those of training. The weights stay as they are meanwhile."""
    token = _sampling.set({})
    try:
        yield
    finally:
        _sampling.reset(token)


@dataclass(frozen=True)
class RowKernels:
    """What a device offers; `rows.py` says what each computes."""

    rms_norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
    rotate_heads: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]


CPU = RowKernels(rows.rms_norm, rows.rotate_heads, rows.swiglu)
GPU = RowKernels(liger.rms_norm, liger.rotate_heads, liger.swiglu)


def choose_kernels(tensor: Tensor) -> RowKernels | None:
    """What a layer takes for this input: kernels under bf16 autocast or while sampling, otherwise none.

    It asks autocast, whose state activation checkpointing restores when it computes a layer again.
    """
    if not (_is_bf16(tensor) or _is_sampling()):
        return None
    if tensor.device.type == "cpu":
        return CPU if load_library() is not None else None
    if tensor.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if _is_bf16(tensor) else torch.float32
    return GPU if liger.explain_liger_absence(tensor.device, dtype) is None else None


def multiply_while_sampling(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x weight^T + bias in `dtype`, rounded to bf16 before it, where the generator runs in bf16 on a CPU that has the
    kernel for few rows; None elsewhere.

    The bf16 copy of a weight is made once for all of the sampling, and read by prompts (many rows) as well.
    """
    if not takes_few_rows(x):
        return None
    x, weight = x.to(torch.bfloat16), read_rounded(weight)
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return multiply_few_rows(x, weight, None if bias is None else bias.float(), dtype)
    return nn.functional.linear(x, weight, bias).to(dtype)


def takes_few_rows(x: Tensor) -> bool:
    """Whether the generator is at work in bf16 on a CPU that has the kernels for it."""
    return _is_sampling() and x.device.type == "cpu" and _is_bf16(x) and has_pairs()


def read_rounded(weight: Tensor) -> Tensor:
    """A weight's bf16 copy, the same in all of the sampling; the weight itself where it is in bf16."""
    held = _sampling.get()
    assert held is not None, "weights are rounded while sampling only"
    if weight.dtype == torch.bfloat16:
        return weight
    if id(weight) not in held:
        held[id(weight)] = weight, weight.to(torch.bfloat16)
    return held[id(weight)][1]


def is_installed(module: nn.Module) -> bool:
    """Whether a layer's forward is one of those below."""
    forward = getattr(vars(module).get("forward"), "__func__", None)
    return forward in (_attention_forward, _norm_forward, _linear_forward, _mlp_forward)


def takes_kernels(model: nn.Module) -> bool:
    """Whether each of a model's linear layers has the forward below, its adapters' too."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    return has_pairs() and all(is_installed(module) for module in linear)


def _is_sampling() -> bool:
    return _sampling.get() is not None and not torch.is_grad_enabled()


def _is_bf16(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def install_kernels(model: PreTrainedModel) -> int:
    """Replace the forwards of the layers that the kernels know; returns how many were."""
    if load_library() is None and not torch.cuda.is_available():
        return 0
    chosen = [(module, _choose(module)) for module in model.modules()]
    for module, forward in chosen:
        if forward is not None:
            # A bound method and no closure: a copy of the model then calls its own weights.
            module.forward = MethodType(forward, module)
    return sum(forward is not None for _, forward in chosen)


def install_products(model: nn.Module) -> None:
    """The same for linear layers alone: those that an adapter has brought."""
    linear: list[Any] = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linear if has_pairs() else ():
        module.forward = MethodType(_linear_forward, module)


def _choose(module: nn.Module) -> Callable[..., Any] | None:
    if type(module).__name__ in WINDOWS and _has_plain_heads(module):
        return _attention_forward
    if type(module).__name__.endswith("RMSNorm") and _is_plain_norm(module):
        return _norm_forward
    if type(module) is nn.Linear:  # a layer of an adapter or in 4 bits is another class
        return _linear_forward if has_pairs() else None
    children = dict(module.named_children())
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= children.keys() and _is_silu(children["act_fn"]):
        return _mlp_forward
    return None


@torch.no_grad()
def _is_silu(function: Any) -> bool:
    probe = torch.linspace(-3.0, 3.0, 13)
    return torch.allclose(function(probe), nn.functional.silu(probe), atol=1e-6)


@torch.no_grad()
def _is_plain_norm(module: Any) -> bool:
    """Whether it is weight x / rms(x), with a float32 weight: Gemma's, for one, has 1 + weight."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or eps is None or weight.dtype != torch.float32 or weight.device.type not in ("cpu", "cuda"):
        return False
    probe = torch.linspace(-2.0, 3.0, 3 * len(weight), device=weight.device).view(3, -1)
    wanted = weight * probe * torch.rsqrt(probe.pow(2).mean(-1, keepdim=True) + eps)
    return torch.allclose(module(probe), wanted, atol=1e-5)


def _has_plain_heads(module: Any) -> bool:
    """Whether its heads are even in width, and their norms, if any, are over one head each."""
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if module.head_dim % 2 or (norms[0] is None) != (norms[1] is None):
        return False
    return all(norm is None or (_is_plain_norm(norm) and len(norm.weight) == module.head_dim) for norm in norms)


def _norm_forward(self: Any, hidden_states: Tensor) -> Any:
    fits = hidden_states.dtype == self.weight.dtype == torch.float32
    kernels = choose_kernels(hidden_states) if fits else None
    if kernels is None:
        return type(self).forward(self, hidden_states)
    # What follows a norm is a product, for which autocast would cast this to bf16 each time it is read.
    dtype = torch.bfloat16 if _is_bf16(hidden_states) else torch.float32
    return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype)


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    out = multiply_while_sampling(x, self.weight, self.bias, torch.bfloat16)
    return type(self).forward(self, x) if out is None else out


def _mlp_forward(self: Any, hidden_states: Tensor) -> Any:
    kernels = choose_kernels(hidden_states)
    if kernels is None:
        return type(self).forward(self, hidden_states)
    return self.down_proj(kernels.swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    width, (cosine, sine) = int(self.head_dim), position_embeddings
    plain = len(hidden_states) == 1 and cosine.shape[-1] == width and cosine.dtype == torch.float32
    plain = plain and past_key_values is None and kwargs.get("forest") is not None
    kernels = choose_kernels(hidden_states) if plain else None
    if kernels is None:
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
    norms = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
    query_THD, key_TJD = (
        projected.view(-1, projected.shape[-1] // width, width)
        for projected in (self.q_proj(hidden_states), self.k_proj(hidden_states))
    )
    query_THD, key_TJD = kernels.rotate_heads(query_THD, key_TJD, norms, cosine[0].contiguous(), sine[0].contiguous())
    query, key = query_THD.transpose(0, 1)[None], key_TJD.transpose(0, 1)[None]
    value = self.v_proj(hidden_states).view(key.shape[2], -1, width).transpose(0, 1)[None]
    window = WINDOWS[type(self).__name__](self)
    out, _ = forest_attention(self, query, key, value, None, scaling=self.scaling, sliding_window=window, **kwargs)
    return self.o_proj(out.flatten(2)), None
