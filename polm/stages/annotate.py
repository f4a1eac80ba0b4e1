"""`polm annotate`: log-probabilities of a frozen model over a data set, computed once and fingerprinted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from polm.data.examples import (
    Ledger,
    build_conversation_trees,
    build_document_trees,
    build_preference_trees,
    drop_bad_record,
)
from polm.data.readers import iterate_conversations, iterate_documents, iterate_preferences
from polm.engine.annotate import annotate_trees
from polm.engine.device import use_bf16
from polm.recipe import AnnotateSettings
from polm.stages.common import (
    Base,
    Context,
    Stage,
    StageResult,
    annotation_fingerprint,
    input_file,
    load_base,
    new_ledger,
    save_annotation,
    start_stage,
)
from polm.tokens import Tree


def run(settings: AnnotateSettings, context: Context) -> StageResult:
    """Score the data set under `model` into scores.safetensors, with fingerprint.json beside it."""
    start_stage(settings, context)
    model = load_base(context.inputs["model"])
    ledger = new_ledger()
    trees = _build_trees(settings, context, model, ledger)
    annotation = annotate_trees(
        model.model,
        trees,
        bin_tokens=settings.bin_tokens,
        top_k=settings.top_k,
        bf16=use_bf16(settings.precision, model.model.device.type),
        report=lambda done, total: context.report({"update": done, "num_updates": total}),
    )
    fingerprint = annotation_fingerprint(model.tokenizer, trees, model.name, settings.top_k)
    save_annotation(context.workdir, annotation, fingerprint)
    targets = ledger["tokens_supervised"]
    mean = float(annotation.logprobs.sum(dtype="float64")) / max(1, targets)
    return StageResult({"targets": targets, "mean_logprob": mean, **fingerprint}, dict(ledger))


def _build_trees(settings: AnnotateSettings, context: Context, model: Base, ledger: Ledger) -> Sequence[Tree]:
    """The trees exactly as the training stage will build them."""
    limit = min(settings.max_tokens or model.max_positions, model.max_positions)
    file = input_file(context, "data", f"{settings.data}.jsonl")
    if settings.data == "midtrain":
        return build_document_trees(
            model.tokenizer,
            iterate_documents(file),
            context=limit,
            too_long=settings.too_long,
            ledger=ledger,
            folder=context.workdir,
        )
    more: dict[str, Any] = {"context": limit, "too_long": settings.too_long, "bad_records": settings.bad_records}
    more |= {"ledger": ledger, "folder": context.workdir}
    on_bad = partial(drop_bad_record, settings.bad_records, ledger)
    if settings.data == "preferences":
        return build_preference_trees(model.tokenizer, iterate_preferences(file, on_bad), **more)
    talks = iterate_conversations(file, on_bad)
    return build_conversation_trees(model.tokenizer, talks, train_on=settings.train_on, **more)


STAGE = Stage(
    "annotate",
    "produce",
    AnnotateSettings,
    run,
    inputs=("model", "data"),
    summary="log-probabilities of a frozen model over a data set",
)
