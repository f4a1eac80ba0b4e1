"""Do a reward model and DPO learn from people's harmlessness judgements, beyond the length of the answers?

python evidence/hh_rlhf/run.py DATA [--tiny]    # DATA holds hh_rlhf/ and text/; goes on where it stopped

Everything is chosen on a validation part of the training pairs; the test pairs are read once, at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from polm.config import Settings
from polm.data.examples import build_preference_trees
from polm.data.holdout import split_holdout
from polm.data.readers import read_preferences, write_json, write_jsonl
from polm.data.records import Preference, build_row
from polm.engine.annotate import annotate_trees, compute_tree_values
from polm.evals.claims import build_claim, write_claims
from polm.evals.reward_models import (
    Floats,
    build_judged,
    choose_length_direction,
    compute_length_accuracy,
    compute_ranked,
    report_pairs,
)
from polm.evals.statistics import compute_paired_bootstrap, compute_wilson_interval
from polm.flywheel.store import Work, execute, external_key
from polm.models.heads import load_scalar_model
from polm.models.loading import load_model, load_tokenizer
from polm.recipe import (
    AnnotateSettings,
    DPOSettings,
    ModelShape,
    OptimizerSettings,
    PretrainSettings,
    RewardModelSettings,
    ScheduleSettings,
    TokenizerSettings,
)
from polm.stages.common import Context, new_ledger
from polm.stages.table import STAGES
from polm.tokens import Tree, tree_length

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs" / "hh_rlhf"
SPLIT_SEED, TEST_SHARE, VALIDATION_SHARE = 0, 0.2, 0.125  # an eighth of the training 80 % is a tenth of all
CONTEXT = 192


@dataclass(frozen=True)
class Scale:
    """What a run costs: `tiny` only shows that the script works."""

    name: str
    seeds: tuple[int, ...]
    shape: ModelShape
    vocab_size: int
    pretrain_epochs: float
    reward_rates: tuple[float, ...]
    dpo_rates: tuple[float, ...]
    epochs: float
    prompt_tokens: int
    answer_tokens: int
    max_pairs: int


WHOLE = Scale(
    name="whole",
    seeds=(0, 1, 2),
    shape=ModelShape(
        hidden_size=96, num_layers=2, num_heads=4, num_key_value_heads=4, intermediate_size=256, max_positions=CONTEXT
    ),
    vocab_size=4096,
    pretrain_epochs=0.5,
    reward_rates=(0.001, 0.003),
    dpo_rates=(0.0003, 0.001),
    epochs=1.0,
    prompt_tokens=48,
    answer_tokens=64,
    max_pairs=1 << 30,
)
TINY = replace(
    WHOLE,
    name="tiny",
    seeds=(0, 1),
    shape=WHOLE.shape.model_copy(update={"hidden_size": 32, "num_layers": 1, "intermediate_size": 64}),
    vocab_size=1024,
    pretrain_epochs=0.03,
    epochs=0.5,
    max_pairs=200,
)


@dataclass(frozen=True)
class Part:
    """Pairs as the models see them, with the lengths of the whole answers in characters, [P]."""

    pairs: list[Preference]
    chosen_length: Floats
    rejected_length: Floats


def make(stage: str, settings: Settings, inputs: Mapping[str, Path], out: Path) -> Path:
    """Run a stage into `out`, unless it is there."""
    if not (out / "manifest.json").is_file():
        sources = {role: str(path) for role, path in inputs.items()}
        keys = {role: external_key(source) for role, source in sources.items()}
        execute(Work(STAGES[stage], settings, sources, keys, out), Context(out, sources))
    return out


def build_base(scale: Scale, data: Path, runs: Path) -> Path:
    """A tokenizer and a language model from plain text; the pairs have no part in it."""
    texts = [
        *(data / "text" / "wiki_demo.txt").read_text(encoding="utf-8").split("\n\n"),
        *(data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8").split("\n\n"),
        *(json.loads(line)["text"] for line in (data / "text" / "c4_demo.jsonl").read_text("utf-8").splitlines()),
    ]
    corpus = runs / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    write_jsonl(corpus / "pretrain.jsonl", ({"text": text.strip()} for text in texts if len(text.strip()) > 40))
    tokenizer = make("tokenizer", TokenizerSettings(vocab_size=scale.vocab_size), {"data": corpus}, runs / "tokenizer")
    settings = PretrainSettings(
        model=scale.shape,
        epochs=scale.pretrain_epochs,
        too_long="split",
        **build_training(0.003, seed=0, bins=8),
    )
    return make("pretrain", settings, {"data": corpus, "tokenizer": tokenizer}, runs / "pretrain")


def build_training(rate: float, *, seed: int, bins: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "bin_tokens": 1024,
        "bins_per_update": bins,
        "precision": "fp32",
        "optimizer": OptimizerSettings(learning_rate=rate, beta2=0.98),
        "schedule": ScheduleSettings(kind="cosine", warmup_updates=5),
    }


def shorten(tokenizer: Any, pair: Preference, scale: Scale) -> Preference:
    """The end of the last human turn as the prompt, and the beginning of each answer."""
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    prompt = tokenizer.decode(encode(pair.prompt[-1]["content"])[-scale.prompt_tokens :])
    answers = [tokenizer.decode(encode(text)[: scale.answer_tokens]) for text in (pair.chosen, pair.rejected)]
    return Preference([{"role": "user", "content": prompt}], answers[0], answers[1])


def build_parts(scale: Scale, data: Path, base: Path, runs: Path) -> tuple[dict[str, Part], dict[str, int]]:
    """Test pairs and training pairs by the hash of the whole dialogue before the answer; the counts of what was left
    out. Each part is written as a data set folder too."""
    tokenizer = load_tokenizer(base / "model")
    pairs = read_preferences(data / "hh_rlhf" / "harmless-base-test.jsonl.gz")[: scale.max_pairs]
    training, test = split_holdout(pairs, TEST_SHARE, SPLIT_SEED)
    fitting, validation = split_holdout(training, VALIDATION_SHARE, SPLIT_SEED + 1)
    parts, counts = {}, {"read": len(pairs)}
    sides = {"training": training, "fitting": fitting, "validation": validation, "test": test}
    for name, members in sides.items():
        short = [(shorten(tokenizer, pair, scale), pair) for pair in members]
        kept = [(one, pair) for one, pair in short if one.chosen != one.rejected]
        counts |= {name: len(kept), f"{name}_equal_once_shortened": len(short) - len(kept)}
        lengths = np.array([[len(pair.chosen), len(pair.rejected)] for _, pair in kept], dtype=np.float64)
        parts[name] = Part([one for one, _ in kept], lengths[:, 0], lengths[:, 1])
        (runs / name).mkdir(parents=True, exist_ok=True)
        write_jsonl(runs / name / "preferences.jsonl", map(build_row, parts[name].pairs))
    openings = {pair.prompt[0]["content"] for pair in training}
    counts["test_with_an_opening_seen_in_training"] = sum(pair.prompt[0]["content"] in openings for pair in test)
    return parts, counts


def build_trees(base: Path, pairs: Sequence[Preference], *, ends: bool) -> list[Tree]:
    return build_preference_trees(
        load_tokenizer(base / "model"),
        pairs,
        context=CONTEXT,
        too_long="error",
        ledger=new_ledger(),
        supervise="end" if ends else "all",
    )


def score_reward_model(folder: Path, part: Part) -> tuple[Floats, Floats]:
    """Rewards of the chosen and of the rejected answers, [P]."""
    trees = build_trees(folder, part.pairs, ends=True)
    values = compute_tree_values(load_scalar_model(folder / "model"), trees, bin_tokens=4096)[:, 0].astype(np.float64)
    return values[0::2], values[1::2]


def score_policy(folder: Path, part: Part, beta: float) -> tuple[Floats, Floats]:
    """beta log p of whole answers, [P]; less those of the reference they are DPO's implicit rewards."""
    trees = build_trees(folder, part.pairs, ends=False)
    logprobs = annotate_trees(load_model(folder / "model"), trees, bin_tokens=4096).logprobs.astype(np.float64)
    sides: tuple[list[float], list[float]] = ([], [])
    offset = 0
    for tree in trees:
        place = offset + len(tree[0])
        for side, segment in zip(sides, tree[1:], strict=True):
            side.append(beta * float(logprobs[place : place + len(segment)].sum()))
            place += len(segment)
        offset += tree_length(tree)
    return np.array(sides[0]), np.array(sides[1])


def train_reward_model(scale: Scale, base: Path, runs: Path, data: str, rate: float, seed: int) -> Path:
    settings = RewardModelSettings(holdout_share=0.0, epochs=scale.epochs, **build_training(rate, seed=seed, bins=2))
    out = runs / f"reward_model-{data}-{rate}-{seed}"
    return make("reward_model", settings, {"base": base, "data": runs / data}, out)


def train_dpo(scale: Scale, base: Path, runs: Path, data: str, rate: float, seed: int) -> Path:
    settings = DPOSettings(epochs=scale.epochs, **build_training(rate, seed=seed, bins=2))
    once = AnnotateSettings(data="preferences", max_tokens=CONTEXT, precision="fp32")
    reference = make("annotate", once, {"model": base, "data": runs / data}, runs / f"reference-{data}")
    inputs = {"base": base, "data": runs / data, "reference": reference}
    return make("dpo", settings, inputs, runs / f"dpo-{data}-{rate}-{seed}")


def compute_margins(method: str, folder: Path, base: Path, part: Part) -> tuple[Floats, Floats]:
    """(rewards of the chosen, of the rejected) by the one or the other method."""
    if method == "reward_model":
        return score_reward_model(folder, part)
    beta = DPOSettings().beta
    assert beta is not None
    policy, reference = score_policy(folder, part, beta), score_policy(base, part, beta)
    return policy[0] - reference[0], policy[1] - reference[1]


def choose_rates(scale: Scale, base: Path, runs: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Validation accuracy of each rate, trained on the fitting part with one seed; the best rate of each method."""
    trials: dict[str, dict[str, float]] = {}
    for method, rates, train in (
        ("reward_model", scale.reward_rates, train_reward_model),
        ("dpo", scale.dpo_rates, train_dpo),
    ):
        trials[method] = {}
        for rate in rates:
            folder = train(scale, base, runs, "fitting", rate, 1000)
            chosen, rejected = compute_margins(method, folder, base, parts["validation"])
            trials[method][str(rate)] = float(compute_ranked(chosen - rejected).mean())
    best = {method: float(max(found, key=lambda r: found[r])) for method, found in trials.items()}
    return {"validation_accuracy": trials, "chosen": best}


def run(scale: Scale, data: Path, runs: Path) -> dict[str, Any]:
    base = build_base(scale, data, runs)
    parts, counts = build_parts(scale, data, base, runs)
    choice = choose_rates(scale, base, runs, parts)
    training, test = parts["training"], parts["test"]
    direction = choose_length_direction(training.chosen_length, training.rejected_length)
    lengths = test.chosen_length, test.rejected_length
    nothing = np.zeros(len(test.pairs))
    by_length = compute_ranked(direction * (test.chosen_length - test.rejected_length))
    out: dict[str, Any] = {
        "counts": counts,
        "choice": choice,
        "length": {
            "direction": direction,
            "training_accuracy": compute_length_accuracy(
                build_judged(
                    np.zeros(len(training.pairs)),
                    np.zeros(len(training.pairs)),
                    training.chosen_length,
                    training.rejected_length,
                ),
                direction,
            ),
            "accuracy": compute_length_accuracy(build_judged(nothing, nothing, *lengths), direction),
            "ranked": by_length.tolist(),
        },
    }
    for method, train in (("reward_model", train_reward_model), ("dpo", train_dpo)):
        out[method] = []
        for seed in scale.seeds:
            folder = train(scale, base, runs, "training", choice["chosen"][method], seed)
            judged = build_judged(*compute_margins(method, folder, base, test), *lengths)
            row = {"seed": seed, **report_pairs(judged, direction), "ranked": compute_ranked(judged.margin_P).tolist()}
            out[method].append(row)
    return out


def build_claims(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Differences in points of accuracy. A claim holds if both of its intervals, over seeds and over test pairs, lie on
    its side: the seeds share one test part."""
    length = np.array(found["length"]["ranked"])
    half = np.full(len(length), 0.5)
    ranked = {name: [np.array(row["ranked"]) for row in found[name]] for name in ("reward_model", "dpo")}
    words = {"reward_model": "the reward model", "dpo": "DPO's implicit reward"}
    claims = []
    for name in ("reward_model", "dpo"):
        for control, other, said in (
            (half, "chance", "better than chance"),
            (length, "length", "better than length alone"),
        ):
            claims.append(
                _build_claim(f"{words[name]} is {said}", name, other, ranked[name], [control] * len(ranked[name]))
            )
    claims.append(
        _build_claim("the reward model is better than DPO's implicit reward", "reward_model", "dpo", *ranked.values())
    )
    return claims


def _build_claim(text: str, arm: str, control: str, ours: list[Floats], theirs: list[Floats]) -> dict[str, Any]:
    differences = [100.0 * float((a - b).mean()) for a, b in zip(ours, theirs, strict=True)]
    metric = "accuracy on held-out pairs (points)"
    claim = build_claim(text, metric=metric, arm=arm, control=control, differences=differences, better="higher")
    over_pairs = compute_paired_bootstrap(100.0 * np.mean(ours, axis=0), 100.0 * np.mean(theirs, axis=0))
    pairs95 = [round(over_pairs.low95, 4), round(over_pairs.high95, 4)]
    return {**claim, "interval95_over_pairs": pairs95, "holds": claim["holds"] and pairs95[0] > 0}


def draw(found: Mapping[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    names = ["length"] + ["reward model"] * len(found["reward_model"]) + ["DPO"] * len(found["dpo"])
    shares = [found["length"]["ranked"], *(row["ranked"] for key in ("reward_model", "dpo") for row in found[key])]
    for i, ranked in enumerate(shares):
        interval = compute_wilson_interval(int(np.floor(np.sum(ranked))), len(ranked))
        mean = float(np.mean(ranked))
        bars = [[mean - interval.low95], [interval.high95 - mean]]
        colour = {"length": "C7", "reward model": "C0", "DPO": "C1"}[names[i]]
        left.errorbar([i], [mean], yerr=np.abs(bars), fmt="o", color=colour, capsize=3)
    left.axhline(0.5, color="black", linewidth=0.8)
    left.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
    left.set_ylabel("accuracy on held-out pairs")
    left.set_title("each seed, 95 % over pairs", fontsize=9)
    for key, colour in (("reward_model", "C0"), ("dpo", "C1")):
        for row in found[key]:
            table = row["reliability"]
            confidence, accuracy = [r["confidence"] for r in table], [r["accuracy"] for r in table]
            right.plot(confidence, accuracy, "o-", color=colour, alpha=0.6, markersize=3)
    right.plot([0.5, 1.0], [0.5, 1.0], color="black", linewidth=0.8)
    right.set_xlabel("how sure: sigmoid(|margin|)")
    right.set_ylabel("accuracy")
    right.set_title("calibration (blue: reward model, orange: DPO)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_table(found: Mapping[str, Any]) -> str:
    """What README.md shows, as Markdown."""
    lines = [
        "| | accuracy | 95 % over pairs | Brier | calibration error | correlation with length |",
        "|---|---|---|---|---|---|",
    ]
    length = found["length"]
    interval = compute_wilson_interval(int(np.floor(np.sum(length["ranked"]))), len(length["ranked"]))
    word = {1: "longer", -1: "shorter", 0: "neither"}[length["direction"]]
    lines.append(
        f"| length ({word}) | {100 * length['accuracy']:.1f} | {100 * interval.low95:.1f} to "
        f"{100 * interval.high95:.1f} | – | – | – |"
    )
    for key, label in (("reward_model", "reward model"), ("dpo", "DPO")):
        for row in found[key]:
            correlation = row["length_correlation"]
            shown = "–" if correlation is None else f"{correlation:+.2f}"
            lines.append(
                f"| {label}, seed {row['seed']} | {100 * row['accuracy']:.1f} | {100 * row['accuracy_low95']:.1f} to "
                f"{100 * row['accuracy_high95']:.1f} | {row['brier']:.3f} | {row['calibration_error']:.3f} | {shown} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a few seconds, into runs/ only: shows that it works")
    given = parser.parse_args()
    scale = TINY if given.tiny else WHOLE
    runs = RUNS / scale.name
    out = runs if given.tiny else HERE
    found = run(scale, given.data, runs)
    claims = build_claims(found)
    write_claims(out / "result.json", claims)
    draw(found, out / "figure.png")
    write_json(runs / "found.json", found)
    print(write_table(found))
    print(json.dumps({"counts": found["counts"], "choice": found["choice"]}, indent=1))
    for claim in claims:
        print(claim["claim"], claim["mean"], claim["interval95"], claim["interval95_over_pairs"], claim["holds"])


if __name__ == "__main__":
    main()
