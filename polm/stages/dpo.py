"""`polm dpo`: preference optimisation, by any of its losses; all answers to a prompt share the prompt's computation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polm.data.examples import (
    Ledger,
    add_mismatched,
    build_feedback_trees,
    build_preference_trees,
    drop_bad_record,
)
from polm.data.readers import is_feedback, iterate_feedback, iterate_preferences
from polm.errors import DataError, RecipeError
from polm.objectives.preference import ANSWER_LOSSES, Knobs, build_preference
from polm.recipe import DPOSettings
from polm.stages.common import (
    Base,
    Context,
    Stage,
    StageResult,
    attach_annotation,
    cached_annotation,
    input_file,
    load_learner,
    new_ledger,
    reference_scores,
    start_stage,
    train_on_trees,
)
from polm.tokens import Tree


def run(settings: DPOSettings, context: Context) -> StageResult:
    """Train `base` on preferences.jsonl (kto, bco: on feedback.jsonl, where there is one).

    The reference is `base` itself unless the input `reference` is given; a loss without a reference scores none.
    """
    start_stage(settings, context)
    objective = build_preference(settings.loss, _collect_knobs(settings))
    _check_reference(settings, context, needed="ref_logprobs" in objective.reads)
    base = load_learner(context, settings)
    ledger = new_ledger()
    trees = _build_trees(settings, context, base, ledger)
    if "ref_logprobs" in objective.reads:
        trees = _attach_reference(settings, context, base, trees)
    return train_on_trees(context, base, trees, objective, settings, ledger)


def _collect_knobs(settings: DPOSettings) -> Knobs:
    """The knobs that the loss reads; the others are None in the settings."""
    given = {
        "beta": settings.beta,
        "label_smoothing": settings.label_smoothing,
        "per_token": settings.per_token,
        "ld_alpha": settings.ld_alpha,
        "wpo": settings.wpo,
        "nll_weight": settings.nll_weight,
        "gamma": settings.gamma,
        "discopop_temperature": settings.discopop_temperature,
        "orpo_lambda": settings.orpo_lambda,
        "desirable_weight": settings.desirable_weight,
        "undesirable_weight": settings.undesirable_weight,
    }
    return Knobs(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _check_reference(settings: DPOSettings, context: Context, *, needed: bool) -> None:
    """An input that would not be read, or scores that cannot be read, are refused before anything is loaded."""
    given = context.inputs.get("reference")
    if given is not None and not needed:
        raise RecipeError(f"dpo: loss: {settings.loss} reads no reference; leave out reference={given}")
    is_scores = given is not None and (Path(given) / "scores.safetensors").is_file()
    if is_scores and settings.loss in ANSWER_LOSSES and ANSWER_LOSSES[settings.loss].mismatched:
        raise RecipeError(
            f"dpo: reference={given} holds scores of preference pairs; loss: {settings.loss} needs those of other "
            "answers too: give the reference model itself, which is then scored once here"
        )


def _build_trees(settings: DPOSettings, context: Context, base: Base, ledger: Ledger) -> Sequence[Tree]:
    """Pairs, or judged answers; for kto and bco the two answers of a pair are one desirable and one undesirable."""
    how: dict[str, Any] = {
        "context": min(settings.bin_tokens, base.max_positions),
        "too_long": settings.too_long,
        "bad_records": settings.bad_records,
        "ledger": ledger,
        "folder": context.workdir,
    }
    on_bad = partial(drop_bad_record, settings.bad_records, ledger)
    if settings.loss not in ANSWER_LOSSES:
        file = input_file(context, "data", "preferences.jsonl")
        return build_preference_trees(base.tokenizer, iterate_preferences(file, on_bad), **how)
    given = Path(context.inputs["data"])
    either = ("feedback.jsonl", "preferences.jsonl")
    file = input_file(context, "data", next((name for name in either if (given / name).is_file()), either[0]))
    if is_feedback(file):
        trees = build_feedback_trees(base.tokenizer, iterate_feedback(file, on_bad), **how)
    else:
        trees = build_preference_trees(base.tokenizer, iterate_preferences(file, on_bad), **how)
    if ANSWER_LOSSES[settings.loss].mismatched:
        return add_mismatched(trees, context=how["context"], ledger=ledger)
    return trees


def _attach_reference(settings: DPOSettings, context: Context, base: Base, trees: Sequence[Tree]) -> Sequence[Tree]:
    """Score the trees under the reference, once, or read its scores."""
    if "reference" in context.inputs:
        scores = reference_scores(
            context, "reference", base, trees, top_k=0, bin_tokens=settings.bin_tokens, precision=settings.precision
        )
    else:
        scores = cached_annotation(
            context.workdir / "scores-base", base, trees, context, 0, settings.bin_tokens, settings.precision
        )
    wrong = int(np.count_nonzero(~np.isfinite(scores.logprobs)))
    if wrong:
        raise DataError(
            f"dpo: {wrong} of {len(scores.logprobs)} log-probabilities of the reference "
            f"({context.inputs.get('reference', base.name)}) are no finite numbers; its weights are damaged, or "
            "precision: fp32 is needed"
        )
    return attach_annotation(trees, "ref", scores)


STAGE = Stage(
    "dpo",
    "train",
    DPOSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference",),
    version=2,
    summary="preference optimisation (DPO, IPO, KTO, ORPO, SimPO and others)",
)
