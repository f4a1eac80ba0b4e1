"""`polm dpo`: direct preference optimisation; both answers of a pair share the prompt's computation."""

from __future__ import annotations

from polm.data.examples import build_preference_trees
from polm.data.readers import read_preferences
from polm.objectives.preference import build_dpo
from polm.recipe import DPOSettings
from polm.stages.common import (
    Context,
    Stage,
    StageResult,
    attach_annotation,
    cached_annotation,
    input_file,
    load_base,
    new_ledger,
    reference_scores,
    start_stage,
    train_on_trees,
)


def run(settings: DPOSettings, context: Context) -> StageResult:
    """Train `base` on preferences.jsonl; the reference is `base` itself unless the input `reference` is given."""
    start_stage(settings, context)
    base = load_base(context.inputs["base"])
    ledger = new_ledger()
    trees = build_preference_trees(
        base.tokenizer,
        read_preferences(input_file(context, "data", "preferences.jsonl")),
        context=min(settings.bin_tokens, base.max_positions),
        too_long=settings.too_long,
        ledger=ledger,
    )
    if "reference" in context.inputs:
        scores = reference_scores(
            context, "reference", base, trees, top_k=0, bin_tokens=settings.bin_tokens, precision=settings.precision
        )
    else:
        scores = cached_annotation(
            context.workdir / "scores-base", base, trees, context, 0, settings.bin_tokens, settings.precision
        )
    trees = attach_annotation(trees, "ref", scores)
    objective = build_dpo(beta=settings.beta, label_smoothing=settings.label_smoothing)
    return train_on_trees(context, base, trees, objective, settings, ledger)


STAGE = Stage(
    "dpo",
    "train",
    DPOSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference",),
    summary="direct preference optimisation",
)
