"""The stages, by name. A stage's name is its file, its command and its artifact folder."""

from __future__ import annotations

from polm.stages import (
    annotate,
    data,
    dpo,
    eval,
    grpo,
    merge_adapter,
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
    "dpo": dpo.STAGE,
    "grpo": grpo.STAGE,
    "merge_adapter": merge_adapter.STAGE,
    "eval": eval.STAGE,
}
