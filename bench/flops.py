"""Floating-point operations that a piece of work needs, counted from the shapes (a product of m x k and k x n: 2mkn).

Forward, for a stream of T tokens with N targets in a model of `body` parameters in matrices outside the embeddings:

    2 * body * T                      the layers' matrices
    4 * heads * width * pairs * L     scores and weighted values; pairs = sum over tokens of the tokens that each sees
    2 * vocab * hidden * N            the head, on target positions only

A training step is three times that (forward, and twice as much backward). What an implementation computes beyond it
(padding, a mask's other half, logits or activations computed again, a prompt once for each of its answers) is not
counted, so the share of the peak falls with waste. The optimizer, norms and softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polm.tokens import TokenBatch


@dataclass(frozen=True)
class Cost:
    """Per-token costs of a model, forward."""

    body: int
    num_layers: int
    attention_width: int
    head: int

    def forward(self, tokens: float, pairs: float, targets: float) -> float:
        """Operations of a forward pass."""
        attention = 4.0 * self.attention_width * self.num_layers * pairs
        return 2.0 * self.body * tokens + attention + 2.0 * self.head * targets

    def train(self, tokens: float, pairs: float, targets: float) -> float:
        """Operations of forward and backward pass."""
        return 3.0 * self.forward(tokens, pairs, targets)

    def of_batch(self, batch: TokenBatch, *, training: bool) -> float:
        """Operations that a forest needs: a shared prompt counts once; a token sees as many as its position says."""
        pairs = float((batch.positions_T + 1).sum())
        count = self.train if training else self.forward
        return count(batch.num_tokens, pairs, batch.num_targets)


def read_cost(model: Any) -> Cost:
    """The costs of a `transformers` decoder."""
    config = model.config.get_text_config()
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Cost(
        body, config.num_hidden_layers, config.num_attention_heads * width, model.get_output_embeddings().weight.numel()
    )


def decode_pairs(prompt: int, new: int) -> float:
    """Pairs (token, token it sees) of reading a prompt once and feeding all but the last of `new` tokens."""
    fed = prompt + new - 1
    return fed * (fed + 1) / 2
