"""`polm midtrain`: annealing, with the tokens weighted evenly (ntp) or by a reference model (remit and its rivals)."""

from __future__ import annotations

from collections.abc import Sequence

from polm.data.examples import build_document_trees
from polm.data.readers import iterate_documents
from polm.errors import UserError
from polm.objectives.distill import build_distill
from polm.objectives.ntp import build_ntp
from polm.objectives.plausible import build_plausible
from polm.objectives.remit import build_remit
from polm.objectives.rho1 import build_rho1
from polm.recipe import MidtrainSettings, is_plausible
from polm.stages.common import (
    Base,
    Context,
    Stage,
    StageResult,
    attach_annotation,
    cached_annotation,
    free_memory,
    input_file,
    load_learner,
    new_ledger,
    reference_scores,
    start_stage,
    train_on_trees,
)
from polm.tokens import Objective, Tree


def build_objective(settings: MidtrainSettings) -> Objective:
    """The objective of a weighting."""
    if settings.weighting == "rho1":
        return build_rho1(keep=settings.keep, base=settings.base, scope=settings.scope)
    if settings.weighting == "distill":
        return build_distill(alpha=settings.alpha, top_k=settings.top_k)
    shuffled = settings.weighting == "shuffled"
    if is_plausible(settings.weighting, settings.shuffles):
        return build_plausible(
            gamma=settings.gamma, floor=settings.floor, denominator=settings.denominator, shuffled=shuffled
        )
    if settings.weighting == "remit" or shuffled:
        return build_remit(
            eps=settings.eps,
            temperature=settings.temperature,
            centring=settings.centring,
            base=settings.base,
            denominator=settings.denominator,
            shuffled=shuffled,
        )
    return build_ntp()


def run(settings: MidtrainSettings, context: Context) -> StageResult:
    """Anneal on midtrain.jsonl. `reference` is a model, or an `annotate` artifact of one over the same data."""
    start_stage(settings, context)
    if settings.weighting != "ntp" and "reference" not in context.inputs:
        raise UserError(
            f"weighting {settings.weighting} compares with a reference model: give reference=MODEL "
            "(the RL-tuned model of the cycle before) or reference=FOLDER of `polm annotate`"
        )
    if settings.weighting == "ntp" and "reference" in context.inputs:
        raise UserError(
            "a reference is given, and weighting ntp reads none: set weighting=remit (or rho1, distill, plausible, "
            "shuffled), or leave reference out"
        )
    base = load_learner(context, settings)
    ledger = new_ledger()
    trees = build_document_trees(
        base.tokenizer,
        iterate_documents(input_file(context, "data", "midtrain.jsonl")),
        context=min(settings.bin_tokens, base.max_positions),
        too_long=settings.too_long,
        ledger=ledger,
        folder=context.workdir,
    )
    trees = _with_scores(settings, context, base, trees)
    result = train_on_trees(context, base, trees, build_objective(settings), settings, ledger)
    return StageResult(result.summary, result.ledger)


def _with_scores(settings: MidtrainSettings, context: Context, base: Base, trees: Sequence[Tree]) -> Sequence[Tree]:
    """Attach what the weighting reads: the reference's scores, and the frozen base's where it is the yardstick."""
    if settings.weighting == "ntp":
        return trees
    reference = reference_scores(
        context,
        "reference",
        base,
        trees,
        top_k=settings.reference_top_k,
        bin_tokens=settings.bin_tokens,
        precision=settings.precision,
    )
    trees = attach_annotation(trees, "ref", reference)
    # Those that read the reference's likeliest tokens compare with no base.
    if settings.base == "frozen" and settings.reference_top_k == 0:
        # Before `fit` restores a checkpoint: the frozen base is the model as it was given.
        frozen = cached_annotation(
            context.workdir / "scores-base", base, trees, context, 0, settings.bin_tokens, settings.precision
        )
        trees = attach_annotation(trees, "base", frozen)
    free_memory()
    return trees


STAGE = Stage(
    "midtrain",
    "train",
    MidtrainSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference",),
    version=2,
    summary="anneal a base, tokens weighted by a reference (ntp, remit, rho1, distill, plausible, shuffled)",
)
