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
    merge_adapter,
    microscope,
    midtrain,
    online,
    pairs,
    ppo,
    pretrain,
    process_reward_model,
    reinforce_pp,
    rejection,
    remax,
    reward_model,
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
    "rejection": rejection.STAGE,
    "pairs": pairs.STAGE,
    "judge": judge.STAGE,
    "constitution": constitution.STAGE,
    "dpo": dpo.STAGE,
    "online": online.STAGE,
    "reward_model": reward_model.STAGE,
    "process_reward_model": process_reward_model.STAGE,
    "grpo": grpo.STAGE,
    "rloo": rloo.STAGE,
    "reinforce_pp": reinforce_pp.STAGE,
    "remax": remax.STAGE,
    "ppo": ppo.STAGE,
    "merge_adapter": merge_adapter.STAGE,
    "eval": eval.STAGE,
}
