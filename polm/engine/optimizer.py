"""Optimizers: AdamW for everything, or Muon on the matrices of the layers beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from polm.engine.muon import Muon
from polm.errors import ModelError
from polm.models.heads import find_scalar_head
from polm.recipe import OptimizerSettings


def build_optimizers(model: PreTrainedModel, settings: OptimizerSettings, *, bf16: bool = False) -> list[Optimizer]:
    """The optimizers of a model, each parameter in exactly one; `initial_lr` of a group is its peak rate.

    With bf16 Muon's products run in bf16, as the model's do; its momentum and the weights stay as they are.
    """
    matrices, others = split_parameters(model, settings)
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(
                matrices,
                lr=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                bf16=bf16,
            )
        )
    if others:
        rate = settings.learning_rate
        if settings.kind == "muon":
            rate = settings.embedding_learning_rate or settings.learning_rate / 4
        optimizers.append(
            torch.optim.AdamW(
                # Norms and other vectors are not decayed.
                [
                    {"params": [p for p in others if not is_vector(p)], "weight_decay": settings.weight_decay},
                    {"params": [p for p in others if is_vector(p)], "weight_decay": 0.0},
                ],
                lr=rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                fused=True,  # one pass over each tensor
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def split_parameters(
    model: PreTrainedModel, settings: OptimizerSettings
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for AdamW) of the trainable parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError("the model has no trainable parameter")
    if settings.kind == "adamw":
        return [], trainable
    # Tables: the model's own embeddings and those of virtual tokens, and the layer that gives logits or values.
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = (model.get_output_embeddings(), find_scalar_head(model))
    tables |= {id(head.weight) for head in heads if head is not None}
    matrices = [p for p in trainable if p.ndim == 2 and not is_vector(p) and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trainable if id(p) not in chosen]


def is_vector(parameter: nn.Parameter) -> bool:
    """Whether it is a vector, also one that is written as a matrix of one row or column (as IA3's scales are)."""
    return parameter.ndim < 2 or min(parameter.shape) == 1


def set_rate(optimizers: Sequence[Optimizer], factor: float) -> float:
    """Set each group's rate to `factor` times its peak; returns the first group's rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    return float(optimizers[0].param_groups[0]["lr"])


def optimizer_tensors(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as flat names (optimizer.parameter.entry), for a safetensors file."""
    out: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                out[f"{number}.{index}.{name}"] = tensor.detach().cpu().contiguous()
    return out


def load_optimizer_tensors(optimizers: Sequence[Optimizer], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            which, index, name = key.split(".", 2)
            if int(which) == number:
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
