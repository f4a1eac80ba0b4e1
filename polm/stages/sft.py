"""`polm sft`: supervised fine-tuning on conversations; only the assistant's tokens are targets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from polm.data.examples import build_conversation_trees, drop_bad_record
from polm.data.readers import iterate_conversations
from polm.objectives.dft import build_dft
from polm.objectives.ntp import build_ntp
from polm.recipe import SFTSettings
from polm.stages.common import (
    Context,
    Stage,
    StageResult,
    input_file,
    load_learner,
    new_ledger,
    start_stage,
    train_on_trees,
)
from polm.text.templates import apply_template
from polm.tokens import Objective


def run(settings: SFTSettings, context: Context) -> StageResult:
    """Fine-tune `base` on sft.jsonl."""
    start_stage(settings, context)
    base = load_learner(context, settings)
    if settings.chat_template is not None:
        apply_template(base.tokenizer, settings.chat_template)
    ledger = new_ledger()
    trees = build_conversation_trees(
        base.tokenizer,
        iterate_conversations(
            input_file(context, "data", "sft.jsonl"), partial(drop_bad_record, settings.bad_records, ledger)
        ),
        context=min(settings.bin_tokens, base.max_positions),
        too_long=settings.too_long,
        train_on=settings.train_on,
        ledger=ledger,
        folder=context.workdir,
        bad_records=settings.bad_records,
    )
    return train_on_trees(context, base, trees, build_objective(settings), settings, ledger)


def build_objective(settings: SFTSettings) -> Objective:
    """The loss, under noisy embeddings where NEFTune is on."""
    objective = build_dft() if settings.loss == "dft" else build_ntp()
    return replace(objective, needs=replace(objective.needs, embedding_noise=settings.neftune_alpha))


STAGE = Stage("sft", "train", SFTSettings, run, inputs=("base", "data"), version=2, summary="supervised fine-tuning")
