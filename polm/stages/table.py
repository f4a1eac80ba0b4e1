"""The stages, by name. A stage's name is its file, its command and its artifact folder."""

from __future__ import annotations

from polm.stages import (
    annotate,
    data,
    dpo,
    eval,
    grpo,
    microscope,
    midtrain,
    pairs,
    pretrain,
    reinforce_pp,
    remax,
    rloo,
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
    "dpo": dpo.STAGE,
    "grpo": grpo.STAGE,
    "rloo": rloo.STAGE,
    "reinforce_pp": reinforce_pp.STAGE,
    "remax": remax.STAGE,
    "eval": eval.STAGE,
}
