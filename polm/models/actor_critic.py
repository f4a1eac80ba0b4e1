"""A policy and its critic as one module, so that one loop trains both and one checkpoint holds both."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


class ActorCritic(nn.Module):
    """Two models side by side that share nothing: a language model, and a scalar model (`heads`) that reads the same
    tokens. `engine.score` gives the log-probabilities of the one and the values of the other.

    `kl_beta` is the weight of the KL penalty. It is a parameter that no gradient reaches, so that a controller's state
    is a part of the weights, and a run that was killed goes on with it.
    """

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel, kl_beta: float = 0.0):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.kl_beta = nn.Parameter(
            torch.tensor(kl_beta, dtype=torch.float64, device=policy.device), requires_grad=False
        )

    @property
    def device(self) -> torch.device:
        return self.kl_beta.device


Trained = PreTrainedModel | ActorCritic
