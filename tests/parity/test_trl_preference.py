"""Preference losses: ours, their gradients and rewards equal those of TRL's DPO, KTO, CPO and ORPO trainers.

`offset`, `share` and the choice of pairs say where TRL's value is another one than the paper's, which ours follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.data.examples import add_mismatched
from polm.engine.score import score
from polm.models.loading import load_model
from polm.objectives.preference import Knobs, build_preference, find_answers
from polm.signals.token_weights import compute_segment_sum
from polm.stages.common import new_ledger
from polm.tokens import TokenBatch, Tree, build_completions, collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PAIRS = [  # prompt, chosen, rejected
    ("w1 w2 w3", "w9 w8", "w10 w11 w12 w13"),
    ("w4", "w5 w6 w7 w5 w11", "w20"),
    ("w30 w31 w32 w33 w34", "w2", "w3 w2"),
]
# TRL's likelihood is a mean over the tokens of the batch, ours over those of each answer: with chosen answers of one
# length they are the same. ORPO's also covers the prompt but for its first token.
LEVEL = [("w1", "w9 w8", "w10 w11 w12 w13"), ("w4", "w5 w6", "w20"), ("w30", "w2 w7", "w3 w2")]
REWARDS = {
    "dpo/accuracy": "rewards/accuracies",
    "dpo/margin": "rewards/margins",
    "dpo/chosen_reward": "rewards/chosen",
    "dpo/rejected_reward": "rewards/rejected",
}
LOGPROBS = {"dpo/chosen_logprob": "logps/chosen", "dpo/rejected_logprob": "logps/rejected"}
Pairs = list[tuple[str, str, str]]


def build_trees(tokenizer: PreTrainedTokenizerFast, pairs: Pairs) -> list[Tree]:
    trees = []
    for prompt, *answers in pairs:
        completions = [[*tokenizer.convert_tokens_to_ids(a.split()), tokenizer.eos_token_id] for a in answers]
        marks = [{"sign": 1.0}, {"sign": -1.0}]
        trees.append(build_completions(tokenizer.convert_tokens_to_ids(prompt.split()), completions, marks=marks))
    return trees


def add_reference(batch: TokenBatch, reference: PreTrainedModel) -> TokenBatch:
    ref_logprobs_T = torch.zeros(batch.num_tokens)
    with torch.no_grad():
        ref_logprobs_T[batch.targets_N] = score(reference, batch).logprobs_N
    return batch.with_streams(ref_logprobs=ref_logprobs_T)


def build_rows(pairs: Pairs) -> Any:
    return datasets.Dataset.from_list([{"prompt": p + " ", "chosen": c, "rejected": r} for p, c, r in pairs])


def build_dpo_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Pairs, arguments: dict[str, Any]
) -> Any:
    """TRL's DPOTrainer on all pairs as one batch; its reference is the one that `model.config` names."""
    reference = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, attn_implementation="eager")
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(**arguments),
        train_dataset=build_rows(pairs),
        processing_class=tokenizer,
    )


def compute_theirs(trainer: Any) -> Tensor:
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss: Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss


@dataclass(frozen=True)
class Case:
    """TRL's arguments, our loss and knobs; TRL's loss is ours plus `offset`; metrics to compare."""

    theirs: dict[str, Any]
    loss: str
    knobs: dict[str, Any] = field(default_factory=dict)
    offset: float = 0.0
    pairs: Pairs = field(default_factory=lambda: PAIRS)
    metrics: dict[str, str] = field(default_factory=lambda: {**REWARDS, **LOGPROBS})


DPO_CASES = {
    "hinge": Case({"loss_type": ["hinge"]}, "hinge"),
    # TRL takes means over tokens in the loss, and sums in its metrics.
    "ipo": Case({"loss_type": ["ipo"]}, "ipo", {"per_token": True}, metrics=LOGPROBS),
    "length_normalised": Case({"loss_type": ["sigmoid_norm"]}, "sigmoid", {"per_token": True}, metrics=LOGPROBS),
    "ld_dpo": Case({"loss_type": ["sigmoid"], "ld_alpha": 0.3}, "sigmoid", {"ld_alpha": 0.3}, metrics=REWARDS),
    "wpo": Case({"loss_type": ["sigmoid"], "use_weighting": True}, "sigmoid", {"wpo": True}),
    "rpo": Case(
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, "sigmoid", {"nll_weight": 0.7}, pairs=LEVEL
    ),
    "exo": Case({"loss_type": ["exo_pair"], "label_smoothing": 0.1}, "exo", {"label_smoothing": 0.1}),
    "nca": Case({"loss_type": ["nca_pair"]}, "nca"),
    "robust": Case({"loss_type": ["robust"], "label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    "sppo": Case({"loss_type": ["sppo_hard"]}, "sppo"),
    # The paper's losses lie below TRL's by one; the gradients are the same.
    "apo_zero": Case({"loss_type": ["apo_zero"]}, "apo_zero", offset=1.0),
    "apo_down": Case({"loss_type": ["apo_down"]}, "apo_down", offset=1.0),
    "discopop": Case({"loss_type": ["discopop"], "discopop_tau": 0.2}, "discopop", {"discopop_temperature": 0.2}),
}


@pytest.mark.parametrize("name", DPO_CASES)
def test_losses_of_the_dpo_trainer(
    name: str,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    case = DPO_CASES[name]
    folder = model.config._name_or_path
    trainer = build_dpo_trainer(model, tokenizer, case.pairs, {**arguments, "beta": 0.3, **case.theirs})
    their_loss = compute_theirs(trainer) - case.offset
    batch = add_reference(collate(build_trees(tokenizer, case.pairs)), load_model(folder))
    metrics = agree(their_loss, model, build_preference(case.loss, Knobs(beta=0.3, **case.knobs)), learner, [batch])
    theirs = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    for ours, key in case.metrics.items():
        assert metrics[ours] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), ours
    assert abs(theirs["rewards/margins"]) > 0.01  # the reference differs from the model, or nothing was tested


def test_bco(
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    """TRL has no BCO trainer any more. The DPO trainer's `bco_pair` is BCO without its shift, summed over a pair where
    ours is a mean over answers; a reference moved so that the shift is zero makes them comparable."""
    batch = add_reference(collate(build_trees(tokenizer, PAIRS)), load_model(model.config._name_or_path))
    answers_A, _ = find_answers(batch)
    segments_N, reference_N = batch.target_segments_N, batch.at_targets("ref_logprobs")
    with torch.no_grad():
        scores_N = score(learner, batch).logprobs_N - reference_N
    shift = compute_segment_sum(scores_N, segments_N, batch.num_segments)[answers_A].mean()
    assert abs(shift) > 0.01
    moved_T = batch.streams["ref_logprobs"].clone()
    moved_T[batch.starts_S[answers_A]] += shift
    batch = batch.with_streams(ref_logprobs=moved_T)
    sums_A = compute_segment_sum(batch.at_targets("ref_logprobs"), segments_N, batch.num_segments)[answers_A]

    trainer = build_dpo_trainer(model, tokenizer, PAIRS, {**arguments, "beta": 0.3, "loss_type": ["bco_pair"]})
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.precompute_ref_logps = True
    inputs |= {"ref_chosen_logps": sums_A[0::2], "ref_rejected_logps": sums_A[1::2]}
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, inputs) / 2
    metrics = agree(their_loss, model, build_preference("bco", Knobs(beta=0.3)), learner, [batch])
    assert metrics["dpo/anchor"] == pytest.approx(0.0, abs=1e-5)
    theirs = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    for ours in ("dpo/chosen_reward", "dpo/rejected_reward"):
        assert metrics[ours] == pytest.approx(theirs[REWARDS[ours]], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_kto(
    scale: float,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    """Our mismatched answers are those of TRL: the answers of the batch, moved on by one.

    `scale` makes the reference flatter, so that the divergence is estimated below 0, where it is cut off.
    """
    folder = model.config._name_or_path
    rows, trees = [], []
    for number, (prompt, chosen, rejected) in enumerate(PAIRS):
        label = number != 1
        text = chosen if label else rejected
        rows.append({"prompt": prompt + " ", "completion": text, "label": label})
        ids = [*tokenizer.convert_tokens_to_ids(text.split()), tokenizer.eos_token_id]
        marks = [{"sign": 1.0 if label else -1.0}]
        trees.append(build_completions(tokenizer.convert_tokens_to_ids(prompt.split()), [ids], marks=marks))
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=reference,
        args=trl.KTOConfig(beta=0.3, per_device_train_batch_size=8, **weights, **arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    flat = load_model(folder)
    with torch.no_grad():
        reference.get_output_embeddings().weight.mul_(scale)
        flat.get_output_embeddings().weight.mul_(scale)
    batch = collate(add_mismatched(trees, context=128, ledger=new_ledger()))
    batch = add_reference(batch, flat)
    their_loss = compute_theirs(trainer)
    metrics = agree(their_loss, model, build_preference("kto", Knobs(beta=0.3, **weights)), learner, [batch])
    theirs = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    for ours, key in {"dpo/anchor": "kl", "dpo/chosen_reward": "rewards/chosen", **LOGPROBS}.items():
        assert metrics[ours] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), ours
    assert metrics["dpo/rejected_reward"] == pytest.approx(theirs["rewards/rejected"], rel=1e-4, abs=1e-5)
    assert (metrics["dpo/anchor"] > 0.1) == (scale == 1.0)


CPO_CASES = {
    "slic": Case({"loss_type": "hinge", "cpo_alpha": 0.0}, "slic"),
    "slic_with_likelihood": Case({"loss_type": "hinge", "cpo_alpha": 0.9}, "slic", {"nll_weight": 0.3}, pairs=LEVEL),
    "cpo_without_likelihood": Case({"cpo_alpha": 0.0}, "cpo"),
    # The paper's likelihood is a sum over the answer, TRL's a mean: answers of 3 tokens, a third of the weight.
    "cpo": Case({"cpo_alpha": 0.9}, "cpo", {"nll_weight": 0.3}, pairs=LEVEL),
    "cpo_smoothed": Case({"cpo_alpha": 0.0, "label_smoothing": 0.2}, "cpo", {"label_smoothing": 0.2}),
    "simpo": Case({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.2}, "simpo", {"gamma": 0.2}),
    "simpo_with_likelihood": Case(
        {"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 0.2},
        "simpo",
        {"gamma": 0.2, "nll_weight": 0.5},
        pairs=LEVEL,
    ),
}


def compare_reference_free(
    case: Case, trainer: Any, model: PreTrainedModel, learner: PreTrainedModel, agree: Any, scale: float = 0.3
) -> None:
    """Their stored metrics against ours; `logps` are the scores themselves there, and so means for SimPO and ORPO."""
    their_loss = compute_theirs(trainer)
    theirs = {key: values[-1] for key, values in trainer._stored_metrics["train"].items()}
    batch = collate(build_trees(trainer.processing_class, case.pairs))
    knobs = {"orpo_lambda": scale} if case.loss == "orpo" else {"beta": scale}
    objective = build_preference(case.loss, Knobs(**knobs, **case.knobs))
    assert objective.reads == ("weights",)
    metrics = agree(their_loss, model, objective, learner, [batch])
    for ours, key in REWARDS.items():
        assert metrics[ours] == pytest.approx(float(theirs[key]), rel=1e-4, abs=1e-5), ours
    if "dpo/nll" in metrics:
        assert metrics["dpo/nll"] == pytest.approx(float(theirs["nll_loss"]), rel=1e-4)


@pytest.mark.parametrize("name", CPO_CASES)
def test_losses_of_the_cpo_trainer(
    name: str,
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    case = CPO_CASES[name]
    trainer = cpo.CPOTrainer(
        model=model,
        args=cpo.CPOConfig(beta=0.3, **case.theirs, **arguments),
        train_dataset=build_rows(case.pairs),
        processing_class=tokenizer,
    )
    compare_reference_free(case, trainer, model, learner, agree)


def test_orpo(
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    agree: Any,
) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = orpo.ORPOTrainer(
        model=model,
        args=orpo.ORPOConfig(beta=0.3, **arguments),
        train_dataset=build_rows(LEVEL),
        processing_class=tokenizer,
    )
    compare_reference_free(Case({}, "orpo", pairs=LEVEL), trainer, model, learner, agree)


def test_the_pairs_differ_in_length() -> None:
    """Or means and sums, and LD-DPO's tails, would not be told apart."""
    lengths = np.array([[len(c.split()), len(r.split())] for _, c, r in PAIRS])
    assert len(np.unique(lengths[:, 0])) == 3
    assert (lengths[:, 0] < lengths[:, 1]).any()
    assert (lengths[:, 0] > lengths[:, 1]).any()
    assert {len(c.split()) for _, c, _ in LEVEL} == {2}
