"""`polm reward_model`: a reward model from comparisons (Bradley-Terry), reported on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from polm.data.examples import Ledger, build_preference_trees, drop_bad_record
from polm.data.holdout import split_holdout
from polm.data.readers import read_preferences, write_json, write_jsonl
from polm.data.records import Preference
from polm.engine.annotate import compute_tree_values
from polm.engine.device import use_bf16
from polm.evals.reward_models import (
    Judged,
    build_judged,
    choose_length_direction,
    flatten_report,
    report_pairs,
)
from polm.objectives.reward_model import build_reward_model
from polm.recipe import RewardModelSettings
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


def run(settings: RewardModelSettings, context: Context) -> StageResult:
    """Train a scalar head on `base` (a language model, or a reward model that is trained on) on preferences.jsonl.

    Writes the sequence classifier `model/` and, of the held-out pairs, `holdout.jsonl` (a row a pair) and
    `holdout.json` (accuracy, calibration with its table, length).
    """
    start_stage(settings, context)
    head = Head("sequence", num_labels=1, spread=settings.head_spread, seed=settings.seed)
    base = load_scalar_learner(context, context.inputs["base"], settings.adapter, head)
    ledger, held_ledger = new_ledger(), new_ledger()
    on_bad = partial(drop_bad_record, settings.bad_records, ledger)
    pairs = read_preferences(input_file(context, "data", "preferences.jsonl"), on_bad)
    train_pairs, held_pairs = split_holdout(pairs, settings.holdout_share, settings.seed)
    trees = _build_trees(settings, base, train_pairs, ledger)
    held_trees = _build_trees(settings, base, held_pairs, held_ledger) if held_pairs else []
    add_ledger(ledger, held_ledger, "holdout")
    result = train_on_trees(context, base, trees, build_reward_model(settings.center_coefficient), settings, ledger)
    if not held_trees:
        return result
    judged = judge_trees(base, held_trees, settings)
    report = report_pairs(judged, choose_length_direction(*measure_lengths(trees)))
    _write_report(context, judged, report)
    return StageResult({**result.summary, **flatten_report(report, "holdout")}, result.ledger)


def _build_trees(
    settings: RewardModelSettings, base: Base, pairs: Sequence[Preference], ledger: Ledger
) -> Sequence[Tree]:
    limit = min(settings.bin_tokens, base.max_positions)
    return build_preference_trees(
        base.tokenizer,
        pairs,
        context=limit,
        too_long=settings.too_long,
        ledger=ledger,
        supervise="end",
        bad_records=settings.bad_records,
    )


def judge_trees(base: Base, trees: Sequence[Tree], settings: RewardModelSettings) -> Judged:
    """Rewards of both answers of each tree, chosen first."""
    bf16 = use_bf16(settings.precision, base.model.device.type)
    values = compute_tree_values(base.model, trees, bin_tokens=settings.bin_tokens, bf16=bf16)[:, 0]
    return build_judged(values[0::2], values[1::2], *measure_lengths(trees))


def measure_lengths(trees: Sequence[Tree]) -> tuple[Array, Array]:
    """Lengths in tokens of the chosen and of the rejected answer of each tree, float64 [P]."""
    lengths = np.array([[len(chosen), len(rejected)] for _, chosen, rejected in trees], dtype=np.float64)
    return lengths[:, 0], lengths[:, 1]


def _write_report(context: Context, judged: Judged, report: dict[str, object]) -> None:
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    columns = (judged.chosen_P, judged.rejected_P, judged.chosen_length_P, judged.rejected_length_P)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    write_jsonl(context.workdir / "holdout.jsonl", (dict(zip(names, row, strict=True)) for row in rows))
    write_json(context.workdir / "holdout.json", report)


STAGE = Stage(
    "reward_model",
    "train",
    RewardModelSettings,
    run,
    inputs=("base", "data"),
    summary="a reward model from preference pairs",
)
