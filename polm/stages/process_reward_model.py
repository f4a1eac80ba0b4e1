"""`polm process_reward_model`: a process reward model from labelled steps, reported on held-out answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from polm.data.examples import Ledger, drop_bad_record
from polm.data.holdout import split_holdout
from polm.data.readers import read_stepwise, write_json, write_jsonl
from polm.data.records import Stepwise
from polm.data.steps import build_step_trees
from polm.engine.annotate import compute_tree_values
from polm.engine.device import use_bf16
from polm.evals.process_reward_models import report_steps
from polm.evals.reward_models import compute_sigmoid, flatten_report
from polm.models.heads import SEPARATOR_FIELD
from polm.objectives.process_reward_model import RIGHT, WRONG, build_process_reward_model
from polm.recipe import ProcessRewardModelSettings
from polm.stages.common import (
    Base,
    Context,
    Stage,
    StageResult,
    add_ledger,
    input_file,
    new_ledger,
    start_stage,
    train_on_trees,
)
from polm.stages.scalar import Head, load_scalar_learner
from polm.tokens import Array, Tree


def run(settings: ProcessRewardModelSettings, context: Context) -> StageResult:
    """Train a head of two labels (wrong, right) on `base` on stepwise.jsonl.

    Writes the token classifier `model/`, whose config names the separator, and, of the held-out answers,
    `holdout.jsonl` (a row an answer) and `holdout.json` (steps, first errors, calibration).
    """
    start_stage(settings, context)
    head = Head("token", num_labels=2, spread=settings.head_spread, seed=settings.seed)
    base = load_scalar_learner(context, context.inputs["base"], settings.adapter, head)
    base.model.config.id2label, base.model.config.label2id = {0: "wrong", 1: "right"}, {"wrong": 0, "right": 1}
    setattr(base.model.config, SEPARATOR_FIELD, settings.separator)
    ledger, held_ledger = new_ledger(), new_ledger()
    on_bad = partial(drop_bad_record, settings.bad_records, ledger)
    records = read_stepwise(input_file(context, "data", "stepwise.jsonl"), on_bad)
    train_records, held_records = split_holdout(records, settings.holdout_share, settings.seed)
    trees = _build_trees(settings, base, train_records, ledger, last_only=settings.last_step_only)
    held_trees = _build_trees(settings, base, held_records, held_ledger) if held_records else []
    add_ledger(ledger, held_ledger, "holdout")
    result = train_on_trees(context, base, trees, build_process_reward_model(), settings, ledger)
    if not held_trees:
        return result
    bf16 = use_bf16(settings.precision, base.model.device.type)
    values_NL = compute_tree_values(base.model, held_trees, bin_tokens=settings.bin_tokens, bf16=bf16)
    right_N = compute_sigmoid((values_NL[:, RIGHT] - values_NL[:, WRONG]).astype(np.float64))
    labels = [list_labels(tree) for tree in held_trees]
    rights = np.split(right_N, np.cumsum([len(own) for own in labels])[:-1])
    report = report_steps(rights, labels)
    rows = ({"right": r.tolist(), "labels": y.tolist()} for r, y in zip(rights, labels, strict=True))
    write_jsonl(context.workdir / "holdout.jsonl", rows)
    write_json(context.workdir / "holdout.json", report)
    return StageResult({**result.summary, **flatten_report(report, "holdout")}, result.ledger)


def _build_trees(
    settings: ProcessRewardModelSettings,
    base: Base,
    records: Sequence[Stepwise],
    ledger: Ledger,
    *,
    last_only: bool = False,
) -> Sequence[Tree]:
    return build_step_trees(
        base.tokenizer,
        records,
        separator=settings.separator,
        context=min(settings.bin_tokens, base.max_positions),
        too_long=settings.too_long,
        ledger=ledger,
        last_only=last_only,
        bad_records=settings.bad_records,
    )


def list_labels(tree: Tree) -> Array:
    """Labels of a tree's steps, float64."""
    streams = tree[1].streams
    labels: Array = streams["labels"][streams["weights"] != 0].astype(np.float64)
    return labels


STAGE = Stage(
    "process_reward_model",
    "train",
    ProcessRewardModelSettings,
    run,
    inputs=("base", "data"),
    summary="a process reward model from labelled steps",
)
