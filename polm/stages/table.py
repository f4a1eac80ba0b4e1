"""The stages, by name. A stage's name is its file, its command and its artifact folder."""

from __future__ import annotations

from polm.stages import (
    annotate,
    constitution,
    data,
    dpo,
    eval,
    grpo,
    judge,
    microscope,
    midtrain,
    pairs,
    pretrain,
    sft,
    tokenizer,
)
from polm.stages.common import Stage

STAGES: dict[str, Stage] = {
    "data": data.STAGE,
    "tokenizer": tokenizer.STAGE,
    "pretrain": pretrain.STAGE,
    "annotate": annotate.STAGE,
    "microscope": microscope.STAGE,
    "midtrain": midtrain.STAGE,
    "sft": sft.STAGE,
    "pairs": pairs.STAGE,
    "judge": judge.STAGE,
    "constitution": constitution.STAGE,
    "dpo": dpo.STAGE,
    "grpo": grpo.STAGE,
    "eval": eval.STAGE,
}
