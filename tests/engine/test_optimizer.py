"""Which optimizer trains what, and that AdamW steps as its formula says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from polm.engine.optimizer import (
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    set_rate,
    split_parameters,
)
from polm.errors import ModelError
from polm.recipe import OptimizerSettings

MUON = OptimizerSettings(kind="muon", learning_rate=0.02, embedding_learning_rate=0.003, weight_decay=0.1)


@pytest.mark.parametrize("tie", [True, False])
def test_muon_has_the_matrices_of_the_layers_and_nothing_else(
    build_tiny: Callable[..., PreTrainedModel], tie: bool
) -> None:
    model = build_tiny(tie_embeddings=tie)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, others = split_parameters(model, MUON)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer = (*projections, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in layer}
    assert {names[id(p)] for p in matrices} == expected
    rest = [names[id(p)] for p in others]
    assert len(rest) == len(set(rest))
    tables = {"model.embed_tokens.weight"} | (set() if tie else {"lm_head.weight"})
    assert tables <= set(rest)
    assert all("norm" in name for name in set(rest) - tables)
    assert {*expected, *rest} == set(names.values())


def test_each_parameter_is_in_exactly_one_group(build_tiny: Callable[..., PreTrainedModel]) -> None:
    model = build_tiny(tie_embeddings=True)
    for settings in (MUON, OptimizerSettings()):
        optimizers = build_optimizers(model, settings)
        held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == {id(p) for p in model.parameters()}
    assert [type(o).__name__ for o in build_optimizers(model, MUON)] == ["Muon", "AdamW"]
    assert [type(o).__name__ for o in build_optimizers(model, OptimizerSettings())] == ["AdamW"]


def test_frozen_parameters_are_left_out(build_tiny: Callable[..., PreTrainedModel]) -> None:
    model = build_tiny()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        build_optimizers(model, OptimizerSettings())
    model.model.norm.weight.requires_grad_(True)
    (only,) = build_optimizers(model, MUON)
    assert [p.shape for group in only.param_groups for p in group["params"]] == [(32,)]


def test_rates_and_decay(build_tiny: Callable[..., PreTrainedModel]) -> None:
    model = build_tiny()
    muon, adamw = build_optimizers(model, MUON)
    assert set_rate([muon, adamw], 0.5) == 0.01
    assert [group["lr"] for group in muon.param_groups] == [0.01]
    assert [group["lr"] for group in adamw.param_groups] == [0.0015, 0.0015]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]  # tables, vectors
    set_rate([muon, adamw], 1.0)  # a share of the peak, not of the last rate
    assert muon.param_groups[0]["lr"] == 0.02
    without = build_optimizers(model, MUON.model_copy(update={"embedding_learning_rate": None}))
    assert without[1].param_groups[0]["lr"] == 0.005  # a quarter


def test_adamw_by_hand(build_tiny: Callable[..., PreTrainedModel]) -> None:
    """First step: m = 0.1 g, v = 0.05 g^2; both are bias-corrected to g and g^2, so the step is
    lr * g / (|g| + eps) after p has shrunk by lr * decay. Second step with gradient h:
    m = 0.09 g + 0.1 h over 1 - 0.81, v = 0.0475 g^2 + 0.05 h^2 over 1 - 0.9025."""
    model = build_tiny()
    settings = OptimizerSettings(learning_rate=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.5)
    (adamw,) = build_optimizers(model, settings)
    matrix, vector = model.model.layers[0].mlp.up_proj.weight, model.model.norm.weight
    matrix_before, vector_before = matrix[0, 0].item(), vector[0].item()
    g, h = 2.0, -1.0
    for gradient in (g, h):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        adamw.step()
    first = 0.1 * g / (abs(g) + 1e-8)
    m, v = (0.09 * g + 0.1 * h) / 0.19, (0.0475 * g * g + 0.05 * h * h) / 0.0975
    second = 0.1 * m / (v**0.5 + 1e-8)
    decayed = (matrix_before * 0.95 - first) * 0.95 - second
    assert matrix[0, 0].item() == pytest.approx(decayed, abs=1e-6)
    assert vector[0].item() == pytest.approx(vector_before - first - second, abs=1e-6)


@pytest.mark.parametrize("settings", [MUON, OptimizerSettings()], ids=["muon", "adamw"])
def test_state_goes_through_flat_tensors_and_back(
    build_tiny: Callable[..., PreTrainedModel], settings: OptimizerSettings
) -> None:
    model = build_tiny()
    optimizers = build_optimizers(model, settings)
    torch.manual_seed(0)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizers).items()}
    assert len(tensors) > len(list(model.parameters()))
    others = build_optimizers(model, settings)
    load_optimizer_tensors(others, tensors)
    again = optimizer_tensors(others)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)
