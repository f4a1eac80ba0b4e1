"""`polm pretrain`: next-token prediction from random weights, or on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from polm.data.examples import build_document_trees
from polm.data.readers import iterate_documents
from polm.engine.device import pick_device
from polm.errors import UserError
from polm.models.loading import build_model, load_tokenizer
from polm.objectives.ntp import build_ntp
from polm.recipe import PretrainSettings
from polm.stages.common import (
    Base,
    Context,
    Stage,
    StageResult,
    input_file,
    load_learner,
    model_folder,
    new_ledger,
    start_stage,
    train_on_trees,
)


def run(settings: PretrainSettings, context: Context) -> StageResult:
    """Train on pretrain.jsonl. With the input `base` it goes on from that model and `model` in the recipe is unused."""
    start_stage(settings, context)
    if "base" in context.inputs:
        base = load_learner(context, settings)
    elif settings.adapter is not None:
        raise UserError("pretrain from random weights has nothing to adapt: give base=MODEL, or leave adapter out")
    elif "tokenizer" in context.inputs:
        base = build_new_base(settings, context.inputs["tokenizer"])
    else:
        raise UserError("pretrain from random weights needs tokenizer=FOLDER (or base=MODEL to go on from a model)")
    ledger = new_ledger()
    trees = build_document_trees(
        base.tokenizer,
        iterate_documents(input_file(context, "data", "pretrain.jsonl")),
        context=min(settings.bin_tokens, base.max_positions),
        too_long=settings.too_long,
        ledger=ledger,
        folder=context.workdir,
    )
    return train_on_trees(context, base, trees, build_ntp(), settings, ledger)


def build_new_base(settings: PretrainSettings, tokenizer_source: str) -> Base:
    """Random weights, drawn from the seed, for the vocabulary of a tokenizer folder or artifact."""
    folder = model_folder_of_tokenizer(tokenizer_source)
    tokenizer = load_tokenizer(folder)
    model = build_model(
        **settings.model.model_dump(),
        vocab_size=len(tokenizer),
        seed=settings.seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return Base(model.to(pick_device()), tokenizer, folder)


def model_folder_of_tokenizer(source: str) -> str:
    """A tokenizer artifact holds its files in `model/`, like a model."""
    inner = Path(source) / "model"
    return str(inner) if (inner / "tokenizer_config.json").is_file() else model_folder(source)


STAGE = Stage(
    "pretrain",
    "train",
    PretrainSettings,
    run,
    inputs=("data",),
    optional_inputs=("tokenizer", "base"),
    version=2,
    summary="next-token prediction from random weights",
)
