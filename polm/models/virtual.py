"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning put before every text.

They are one root segment of the forest, above all trees of a batch: what they compute depends on nothing below
them, so a batch computes it once, and all positions go on behind them. Prompt tuning and P-tuning give the root's
embeddings. Prefix tuning gives its keys and values in each layer, so that root is no part of the stream; `PrefixPlan`
puts it before the stream's own keys.

A model has them if an attribute of the name VIRTUAL says where they come from (`models/adapters.py` sets it).

Shape suffixes: P virtual tokens, T stream, H query heads, J key heads, D width (of the model, or of a head).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, cat, nn
from transformers import PreTrainedModel

from polm.models.forest_attention import Attends

VIRTUAL = "polm_virtual"
Layers = Mapping[int, tuple[Tensor, Tensor]]  # layer -> (key_JPD, value_JPD)


@dataclass(frozen=True)
class VirtualTokens:
    """`num` tokens that stand at positions 0 to num - 1 of every path: embeddings, or keys and values a layer."""

    num: int
    embeddings_PD: Tensor | None = None
    layers: Layers | None = None


Source = Callable[[], VirtualTokens | None]


def read_virtual(model: PreTrainedModel) -> VirtualTokens | None:
    """The model's virtual tokens as they are now, with their gradients; None without any, or while they are off."""
    source: Source | None = getattr(model, VIRTUAL, None)
    return source() if source is not None else None


class PrefixPlan:
    """A plan for `num` + T tokens over a stream of T: the first `num` have given keys and values and ask nothing."""

    def __init__(self, plan: Attends, num: int, layers: Layers):
        self.plan, self.num, self.layers = plan, num, layers

    def attend(
        self, layer: int, query_HTD: Tensor, key_JTD: Tensor, value_JTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention output [T, H, D]."""
        key_JPD, value_JPD = (own.to(key_JTD.dtype) for own in self.layers[layer])
        # Queries of zeros stand for the virtual tokens: their output is cut off, so their gradient is zero.
        query_HTD = nn.functional.pad(query_HTD, (0, 0, self.num, 0))
        key_JTD, value_JTD = cat([key_JPD, key_JTD], dim=1), cat([value_JPD, value_JTD], dim=1)
        return self.plan.attend(layer, query_HTD, key_JTD, value_JTD, scale, window)[self.num :]
