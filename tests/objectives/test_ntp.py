"""Next-token prediction by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polm.objectives.ntp import build_ntp
from polm.tokens import Scores, Segment, Tree, build_completions, build_document, collate

WEIGHTED: Tree = (Segment(np.array([4, 5, 6, 7]), streams={"weights": np.array([0, 0.5, 0, 2.0], dtype=np.float32)}),)


def test_mean_cross_entropy() -> None:
    batch = collate([build_document([1, 2, 3]), build_completions([1, 2], [[3, 4]])])
    logprobs_N = torch.tensor([-0.5, -1.5, -2.0, -3.0], requires_grad=True)
    loss = build_ntp().compute(Scores(logprobs_N), batch)
    assert loss.total.item() == 0.5 + 1.5 + 2.0 + 3.0
    assert float(loss.denominator) == 4.0
    (loss.total / loss.denominator).backward()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == [-0.25, -0.25, -0.25, -0.25]


def test_the_data_s_own_weights_multiply_and_are_counted() -> None:
    logprobs_N = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = build_ntp().compute(Scores(logprobs_N), collate([WEIGHTED]))
    assert loss.total.item() == 0.5 * 1.0 + 2.0 * 3.0
    assert float(loss.denominator) == 2.5
    metric = loss.metrics["ntp/nll"]
    assert float(metric.total) / float(metric.count) == pytest.approx(6.5 / 2.5)
    assert not metric.total.requires_grad
    loss.total.backward()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == [-0.5, -2.0]


def test_the_split_into_micro_batches_does_not_matter() -> None:
    document = build_document([1, 2, 3])
    logprobs_N = torch.tensor([-0.25, -1.5, -1.0, -3.0])
    ntp = build_ntp()
    whole = ntp.compute(Scores(logprobs_N), collate([document, WEIGHTED]))
    halves = [
        ntp.compute(Scores(logprobs_N[:2]), collate([document])),
        ntp.compute(Scores(logprobs_N[2:]), collate([WEIGHTED])),
    ]
    assert whole.total.item() == (halves[0].total + halves[1].total).item()
    assert float(whole.denominator) == float(halves[0].denominator + halves[1].denominator)


def test_a_batch_without_targets_sums_to_zero() -> None:
    loss = build_ntp().compute(Scores(torch.zeros(0)), collate([(Segment(np.array([1, 2])),)]))
    assert loss.total.item() == 0.0
    assert float(loss.denominator) == 0.0
