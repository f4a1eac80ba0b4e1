"""Several optimizer updates in float32: our loop's losses and gradient norms stay equal to those of TRL's trainers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.fit import fit
from polm.engine.score import score
from polm.models.loading import load_model
from polm.objectives.ntp import build_ntp
from polm.objectives.preference import Knobs, build_preference
from polm.recipe import OptimizerSettings, ScheduleSettings, TrainSettings
from polm.tokens import Objective, Step, TokenBatch, Tree, build_completions, collate

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

NUM_UPDATES, RATE = 5, 3e-3
PROMPTS = ("w1 w2 w3", "w4", "w30 w31 w32 w33 w34", "w8 w9")
CHOSEN = ("w9 w8", "w5 w6 w7 w5 w11", "w2", "w20 w21 w22")
REJECTED = ("w10 w11 w12 w13", "w20", "w3 w2", "w1")


@dataclass(frozen=True)
class Same:
    """The same batch at every update."""

    batch: TokenBatch
    num_updates: int = NUM_UPDATES
    reads_weights: bool = False

    def step(self, update: int, model: Any) -> Step:
        del update, model
        return Step([self.batch])

    def resumable(self, update: int) -> bool:
        del update
        return True


def run_ours(model: PreTrainedModel, batch: TokenBatch, objective: Objective, folder: Path) -> list[dict[str, Any]]:
    settings = TrainSettings(
        updates=NUM_UPDATES,
        precision="fp32",
        optimizer=OptimizerSettings(
            kind="adamw", learning_rate=RATE, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0
        ),
        schedule=ScheduleSettings(kind="constant"),
        log_every=1,
    )
    lines: list[Any] = []
    fit(model, Same(batch), objective, settings, folder, report=lines.append)
    return lines


def run_theirs(trainer: Any) -> list[dict[str, Any]]:
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line]


def require_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) == NUM_UPDATES
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]  # the updates have moved the model


@pytest.fixture
def more(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a run of all rows an update, with our optimizer's settings."""
    return arguments | {
        "per_device_train_batch_size": len(PROMPTS),
        "max_steps": NUM_UPDATES,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
    }


def encode(tokenizer: PreTrainedTokenizerFast, answers: tuple[str, ...]) -> list[list[int]]:
    return [[*tokenizer.convert_tokens_to_ids(text.split()), tokenizer.eos_token_id] for text in answers]


def test_sft(
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    more: dict[str, Any],
    tmp_path: Path,
) -> None:
    prompts = [tokenizer.convert_tokens_to_ids(text.split()) for text in PROMPTS]
    trees = [build_completions(p, [c]) for p, c in zip(prompts, encode(tokenizer, CHOSEN), strict=True)]
    rows = [{"prompt": p + " ", "completion": c} for p, c in zip(PROMPTS, CHOSEN, strict=True)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(completion_only_loss=True, **more),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    require_equal(run_ours(learner, collate(trees), build_ntp(), tmp_path / "ours"), run_theirs(trainer))


def test_dpo(
    learner: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    more: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = model.config._name_or_path
    marks = [{"sign": 1.0}, {"sign": -1.0}]
    prompts = [tokenizer.convert_tokens_to_ids(text.split()) for text in PROMPTS]
    answers = zip(encode(tokenizer, CHOSEN), encode(tokenizer, REJECTED), strict=True)
    trees: list[Tree] = [
        build_completions(p, list(pair), marks=marks) for p, pair in zip(prompts, answers, strict=True)
    ]
    batch = collate(trees)
    ref_logprobs_T = torch.zeros(batch.num_tokens)
    with torch.no_grad():
        ref_logprobs_T[batch.targets_N] = score(load_model(folder), batch).logprobs_N
    rows = [{"prompt": p + " ", "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        args=trl.DPOConfig(beta=0.3, **more),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    objective = build_preference("sigmoid", Knobs(beta=0.3))
    batch = batch.with_streams(ref_logprobs=ref_logprobs_T)
    require_equal(run_ours(learner, batch, objective, tmp_path / "ours"), run_theirs(trainer))
