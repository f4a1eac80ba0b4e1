"""A policy and its critic as one module, so that one loop trains both and one checkpoint holds both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ActorCritic(nn.Module):
    """Two models side by side that share nothing: a language model, and a scalar model (`heads`) that reads the same
    tokens. `engine.score` gives the log-probabilities of the one and the values of the other.

    `kl_beta` is the weight of the KL penalty. It is a buffer of the module, which checkpoints keep: a killed run
    goes on with its controller's state.
    """

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel, kl_beta: float = 0.0):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.kl_beta: Tensor
        self.register_buffer("kl_beta", torch.tensor(kl_beta, dtype=torch.float64, device=policy.device))

    @property
    def device(self) -> torch.device:
        return self.kl_beta.device


Trained = PreTrainedModel | ActorCritic
