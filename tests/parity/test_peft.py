"""Adapters through the token forest against `peft`'s own forward on each sequence alone: log-probabilities
(of a classifier: values) and gradients, in float32, on two tiny models of two families."""

from __future__ import annotations

import copy
from typing import Any, Literal

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.engine.score import score
from polm.models.adapters import adapter_parameters, attach_adapter, find_adapter
from polm.models.heads import build_scalar_model
from polm.models.loading import prepare_model
from polm.recipe_adapter import AdapterSettings
from polm.tokens import Needs, Tree, build_completions, build_document, collate

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# Our settings, and the same thing written in peft's words.
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "lora": (
        {"kind": "lora", "rank": 3, "alpha": 5.0},
        peft.LoraConfig(**COMMON, r=3, lora_alpha=5.0, target_modules=LAYERS),
    ),
    "rslora": (
        {"kind": "lora", "rank": 3, "alpha": 5.0, "rslora": True},
        peft.LoraConfig(**COMMON, r=3, lora_alpha=5.0, target_modules=LAYERS, use_rslora=True),
    ),
    "dora": (
        {"kind": "lora", "rank": 3, "targets": ["q_proj", "down_proj"], "dora": True},
        peft.LoraConfig(**COMMON, r=3, lora_alpha=32, target_modules=["q_proj", "down_proj"], use_dora=True),
    ),
    "ia3": (
        {"kind": "ia3"},
        peft.IA3Config(**COMMON, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "prefix": (
        {"kind": "prefix", "virtual_tokens": 4},
        peft.PrefixTuningConfig(**COMMON, num_virtual_tokens=4),
    ),
    "prefix_mlp": (
        {"kind": "prefix", "virtual_tokens": 4, "encoder_width": 6},
        peft.PrefixTuningConfig(**COMMON, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6),
    ),
    "prompt": ({"kind": "prompt", "virtual_tokens": 4}, peft.PromptTuningConfig(**COMMON, num_virtual_tokens=4)),
    "p_tuning": (
        {"kind": "p_tuning", "virtual_tokens": 4, "encoder_width": 6},
        peft.PromptEncoderConfig(**COMMON, num_virtual_tokens=4, encoder_hidden_size=6),
    ),
}


def scatter(parameters: dict[str, Any]) -> None:
    """Random values in place of an initialisation that changes nothing (LoRA's zeros, IA3's ones)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].add_(0.2 * torch.randn(parameters[name].shape, generator=generator))


def align(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
    """Our parameter names by theirs: peft puts its own prefix before a layer's place."""
    names = {name: name.removeprefix("base_model.model.").removeprefix("base_model.") for name in theirs}
    assert sorted(names.values()) == sorted(ours)
    return names


def build_trees() -> tuple[list[Tree], list[list[int]]]:
    """Two prompts with three and two answers, and a document; and each path from root to leaf alone."""
    prompts, answers = [[5, 9, 30, 7], [12, 6]], [[[8, 1], [33, 4, 20, 1], [9]], [[40, 41, 2], [17, 1]]]
    document = [11, 12, 13, 3, 38]
    trees = [build_completions(p, a) for p, a in zip(prompts, answers, strict=True)]
    paths = [[*p, *a] for p, each in zip(prompts, answers, strict=True) for a in each]
    return [trees[0], build_document(document), trees[1]], [*paths[:3], document, *paths[3:]]


def compute_theirs(wrapper: Any, paths: list[list[int]], lengths: list[int]) -> Tensor:
    """Log-probabilities of the last `lengths` tokens of each path, by peft's forward over that path alone."""
    out = []
    for path, length in zip(paths, lengths, strict=True):
        ids = torch.tensor(path)
        logits = wrapper(input_ids=ids[None], use_cache=False).logits[0, -len(path) :].float()
        logprobs = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
        out.append(logprobs[-length:])
    return torch.cat(out)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_forest_computes_what_peft_computes(kind: str, model: PreTrainedModel) -> None:
    learner = prepare_model(copy.deepcopy(model), "learner")
    settings, config = KINDS[kind]
    attach_adapter(learner, AdapterSettings(**settings), "learner", seed=3)
    ours = adapter_parameters(learner)
    wrapper = peft.get_peft_model(model, copy.deepcopy(config))
    theirs = {name: p for name, p in wrapper.named_parameters() if p.requires_grad}
    names = align(ours, theirs)
    scatter(ours)
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(ours[names[name]])

    trees, paths = build_trees()
    lengths = [2, 4, 1, 4, 3, 2]
    expected = compute_theirs(wrapper, paths, lengths)
    found = score(learner, collate(trees)).logprobs_N
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.linspace(-1.0, 2.0, len(expected))
    (weights * expected).sum().backward()
    (weights * found).sum().backward()
    for name, p in theirs.items():
        assert p.grad is not None
        largest = float(p.grad.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(ours[names[name]].grad, p.grad, rtol=1e-4, atol=2e-5 * max(largest, 1.0))
    frozen = [p for name, p in learner.named_parameters() if name not in ours]
    assert frozen
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_the_order_of_trees_and_a_stranger_change_nothing(kind: str, model: PreTrainedModel) -> None:
    learner = prepare_model(model, "learner")
    attach_adapter(learner, AdapterSettings(**KINDS[kind][0]), "learner", seed=3)
    scatter(adapter_parameters(learner))
    trees, _ = build_trees()
    with torch.no_grad():
        alone = torch.cat([score(learner, collate([tree])).logprobs_N for tree in trees])
        packed = score(learner, collate(trees)).logprobs_N
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_virtual_tokens_are_computed_once_a_batch(learner: PreTrainedModel) -> None:
    """Above three trees stand four virtual tokens, not twelve."""
    attach_adapter(learner, AdapterSettings(kind="prompt", virtual_tokens=4), "learner", seed=0)
    rows: list[int] = []
    learner.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    batch = collate(build_trees()[0])
    score(learner, batch)
    assert rows == [batch.num_tokens + 4]


def test_what_is_trained_is_what_peft_would_train(model: PreTrainedModel, learner: PreTrainedModel) -> None:
    attach_adapter(learner, AdapterSettings(kind="lora"), "learner", seed=0)
    adapter = find_adapter(learner)
    assert adapter is not None
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**COMMON, r=16, target_modules="all-linear"))
    assert adapter.wrapper.get_nb_trainable_parameters() == wrapper.get_nb_trainable_parameters()


# ---- a classifier under an adapter -----------------------------------------------------------------------------------

TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}


def compute_their_values(wrapper: Any, layout: str, paths: list[list[int]]) -> Tensor:
    """The values that peft's forward gives at the end of each path, a path alone."""
    logits = [wrapper(input_ids=torch.tensor(path)[None]).logits[0] for path in paths]
    return torch.stack([row if layout == "sequence" else row[-1] for row in logits])


@pytest.mark.parametrize("layout", ["sequence", "token"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_classifier_in_the_forest_computes_what_peft_computes(
    kind: str, layout: Literal["sequence", "token"], model: PreTrainedModel
) -> None:
    """Values at the ends of all paths, and the gradients of the adapter and of the head, which peft trains along."""
    labels = 1 if layout == "sequence" else 2
    learner = build_scalar_model(prepare_model(model, "learner"), layout, num_labels=labels, seed=5)
    plain = copy.deepcopy(learner)
    plain.set_attn_implementation("eager")
    settings, config = KINDS[kind]
    attach_adapter(learner, AdapterSettings(**settings), "learner", seed=3)
    ours = adapter_parameters(learner)
    config = copy.deepcopy(config)
    config.task_type = TASKS[layout]
    wrapper = peft.get_peft_model(plain, config)
    theirs = {name: p for name, p in wrapper.named_parameters() if p.requires_grad}
    names = align(ours, theirs)
    assert any(".modules_to_save." in name for name in ours)
    scatter(ours)
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(ours[names[name]])

    trees, paths = build_trees()
    batch = collate(trees)
    values_TL = score(learner, batch, Needs(values=True)).values_TL
    assert values_TL is not None
    found = values_TL[batch.ends_S[[1, 2, 3, 4, 6, 7]]]
    expected = compute_their_values(wrapper, layout, paths)
    assert float(expected.detach().abs().max()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(-1.0, 2.0, expected.numel()).reshape(expected.shape)
    (weights * expected).sum().backward()
    (weights * found).sum().backward()
    for name, p in theirs.items():
        assert p.grad is not None
        largest = float(p.grad.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(ours[names[name]].grad, p.grad, rtol=1e-3, atol=2e-5 * max(largest, 1.0))
    assert all(p.grad is None for name, p in learner.named_parameters() if name not in ours)
