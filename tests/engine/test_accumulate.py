"""Sums are local and the division is global: how documents are packed and split never changes an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.engine import head
from polm.engine.fit import accumulate, add_up
from polm.models.kernels.proof import WaitingOperations
from polm.objectives.distill import build_distill
from polm.objectives.ntp import build_ntp
from polm.objectives.plausible import build_plausible
from polm.objectives.remit import build_remit
from polm.objectives.rho1 import build_rho1
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch, Tree, build_document, collate

LENGTHS = (3, 17, 5, 11, 2, 23, 8, 13)


def build_trees() -> list[Tree]:
    """Eight documents of unequal length, with a reference's scores beside their tokens."""
    rng = np.random.default_rng(0)
    return [
        build_document(
            rng.integers(2, 40, length), {"ref_logprobs": rng.uniform(-5.0, -0.1, length).astype(np.float32)}
        )
        for length in LENGTHS
    ]


def run_update(
    model: PreTrainedModel, batches: list[TokenBatch], objective: Objective
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    model.zero_grad(set_to_none=True)
    loss, metrics = accumulate(model, batches, objective, 1.0, False)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, metrics


REMIT = build_remit(eps=0.8, temperature=1.0, centring="sequence", base="live", denominator="tokens", shuffled=False)


@pytest.mark.parametrize("objective", [build_ntp(), REMIT], ids=lambda o: o.name)
def test_the_split_does_not_change_the_update(build_tiny: Callable[..., PreTrainedModel], objective: Objective) -> None:
    model = build_tiny()
    trees = build_trees()
    splits = {
        "eight micro-batches of one": [collate([tree]) for tree in trees],
        "two of four": [collate(trees[:4]), collate(trees[4:])],
        "four of two": [collate(trees[i : i + 2]) for i in range(0, 8, 2)],
        "unequal": [collate(trees[:1]), collate(trees[1:])],
    }
    whole_loss, whole_grads, whole_metrics = run_update(model, [collate(trees)], objective)
    assert whole_loss > 1.0
    for name, batches in splits.items():
        loss, grads, metrics = run_update(model, batches, objective)
        assert loss == pytest.approx(whole_loss, rel=1e-6), name
        assert metrics["ntp/nll"] == pytest.approx(whole_metrics["ntp/nll"], rel=1e-6), name
        assert grads.keys() == whole_grads.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, whole_grads[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: k + m)


def test_packing_equals_each_document_alone(build_tiny: Callable[..., PreTrainedModel]) -> None:
    """The loss and the gradient of the packed stream, against plain forward passes of the documents."""
    model = build_tiny()
    trees = build_trees()
    loss, grads, _ = run_update(model, [collate(trees)], build_ntp())
    model.set_attn_implementation("sdpa")
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for tree in trees:
        ids = torch.tensor(tree[0].tokens)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    expected = total / (sum(LENGTHS) - len(LENGTHS))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


def test_metrics_are_means_over_the_whole_update(build_tiny: Callable[..., PreTrainedModel]) -> None:
    """By hand: (2 + 6) / (1 + 3) = 2 and ([1, 0] + [2, 4]) / (1 + 1) = [1.5, 2]."""
    values = iter([(2.0, 1.0, [1.0, 0.0]), (6.0, 3.0, [2.0, 4.0])])

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        assert batch.num_targets > 0
        top, bottom, histogram = next(values)
        metrics = {"a/mean": Metric(torch.tensor(top), bottom), "a/histogram": Metric(torch.tensor(histogram), 1.0)}
        return Loss(scores.logprobs_N.sum() * 0.0 + top, torch.tensor(bottom), metrics)

    batches = [collate(build_trees()[:1]), collate(build_trees()[1:2])]
    loss, metrics = accumulate(build_tiny(), batches, Objective("made up", compute), 1.0, False)
    assert loss == 2.0
    assert metrics == {"a/mean": 2.0, "a/histogram": [1.5, 2.0]}


TOKEN_OBJECTIVES = [
    build_ntp(),
    REMIT,
    build_rho1(keep=0.6, base="live", scope="batch"),
    build_plausible(gamma=0.5, floor=0.1, denominator="tokens", shuffled=False),
    build_distill(alpha=0.5, top_k=3),
]


def build_annotated_trees() -> list[Tree]:
    rng = np.random.default_rng(1)
    trees = []
    for (root,) in build_trees():
        more = {
            "ref_ids": rng.integers(2, 40, (len(root), 3)),
            "ref_topk": np.log(rng.dirichlet(np.ones(4), len(root))[:, :3]).astype(np.float32),
        }
        trees.append((replace(root, streams={**root.streams, **more}),))
    return trees


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES, ids=lambda o: o.name)
def test_a_head_with_its_gradient_in_the_forward_pass_gives_the_same_bits(
    build_tiny: Callable[..., PreTrainedModel], objective: Objective, bf16: bool
) -> None:
    """Two micro-batches, candidates, rows that are padded; with the compiled head where there is one."""
    model, trees = build_tiny(), build_annotated_trees()
    batches = [collate(trees[:4]), collate(trees[4:])]
    found = []
    for linear in (objective.linear, False):
        loss, _ = accumulate(model, batches, replace(objective, linear=linear), 0.8, bf16)
        found.append([torch.tensor(loss), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES, ids=lambda o: o.name)
def test_an_update_asks_for_no_number(
    build_tiny: Callable[..., PreTrainedModel], objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is given the whole update before the host waits for it; so it is in pre-training, SFT and mid-training."""
    # A CPU is asked whether the loss brings the slopes that it promised; test_head.py has what others do.
    monkeypatch.setattr(head, "check_promise", lambda *_: None)
    model, trees = build_tiny(), build_annotated_trees()
    with WaitingOperations() as mode:
        sums = add_up(model, [collate(trees[:4]), collate(trees[4:])], objective, 1.0, False)
        assert not mode.asked
        sums.total.item()
    assert mode.asked  # what the mode is worth
