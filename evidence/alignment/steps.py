"""Part `steps`: process and outcome reward models (arXiv 2305.20050, 2110.14168) on the demo's multiplication.

The warm model of `reft`, of whose training solutions 30 % are wrong, answers questions, and the program labels the
steps of its answers. From the same answers a process reward model (PRM) learns the label of each step, an outcome
reward model (ORM) that of the final answer, and a PRM is trained as LoRA. On held-out questions they find first errors,
choose the best of n of the warm model's answers, and weigh the votes of n answers. Of the tasks it is multiplication
alone: with addition and subtraction as well a PRM needs far more labelled answers (evidence/LOG.md).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, islice
from operator import and_
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import reft
from common import BIN_TOKENS, HERE, group_texts, load, read_row, read_rows, run_stage, sample, write_row
from overoptimisation import compute_best_of
from safetensors.torch import load_file

from polm.data.benchmarks import extract_marked
from polm.data.readers import write_jsonl
from polm.data.steps import split_steps
from polm.demo.corpus import VERIFIER, build_benchmark
from polm.demo.pen import ANSWER_MARK
from polm.demo.tasks import Item
from polm.evals.claims import build_claim
from polm.evals.process_reward_models import report_steps
from polm.rewards.reward_model import Aggregate, aggregate_steps, load_process_reward_model
from polm.rewards.verify import VerifyItem, verify_many
from polm.stages.common import Base
from polm.tokens import Array

PART = "steps"
MY_SEEDS = (110, 111, 112, 113, 114)
TUNING_SEEDS = (0, 1)
SEPARATOR = ","
TASK, NUM_ITEMS = "mul", 300
QUESTIONS, PER_QUESTION = 4000, 2  # drawn to be labelled, of which some 3,700 are distinct; answers to each
LABEL_DRAW, TEST_DRAW = 51, 52
BEST_OF = (1, 2, 4, 8, 16)
SHOWN = ("4", "16")
AGGREGATES: tuple[Aggregate, ...] = ("min", "product", "last")
WORDS = {"prm": "the PRM", "orm": "the ORM", "lora": "the LoRA PRM"}
MARGIN = 2.0  # points
LOWEST = -1.0  # score of an answer without steps or without a final answer


@dataclass(frozen=True)
class Arm:
    """How a model is trained, on which labels, and what its steps' probabilities become."""

    rate: float
    epochs: float
    aggregate: Aggregate
    labels: str = "process"
    optimizer: str = "muon"
    changes: Mapping[str, Any] = field(default_factory=dict)

    def build_optimizer(self) -> dict[str, Any]:
        if self.optimizer == "muon":
            return {"kind": "muon", "learning_rate": self.rate, "embedding_learning_rate": self.rate / 4}
        return {"kind": self.optimizer, "learning_rate": self.rate, "beta2": 0.99}


LORA = {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "targets": "all-linear"}  # as the recipe's
# By the best of 4 and of 16 on the tuning seeds (evidence/LOG.md).
ARMS: Mapping[str, Arm] = {
    "prm": Arm(0.005, 8, "min"),
    "orm": Arm(0.0025, 8, "last", labels="outcome", changes={"last_step_only": True}),
    "lora": Arm(0.001, 8, "min", optimizer="adamw", changes={"adapter": LORA}),
}


# ---- answers in steps ------------------------------------------------------------------------------------------------


def split_solution(text: str) -> list[str]:
    """The steps of a solution, of which `#### answer` is the last."""
    return [step.strip() for step in split_steps(text.replace(ANSWER_MARK, f"{SEPARATOR} {ANSWER_MARK}"), SEPARATOR)]


def label_steps(steps: Sequence[str], solution: str) -> list[bool]:
    """A step is right if it and all before it are those of the only right solution."""
    right = split_solution(solution)
    return list(accumulate((step == (right[i] if i < len(right) else None) for i, step in enumerate(steps)), and_))


@dataclass(frozen=True)
class Answers:
    """Answers of a model to questions, as many to each."""

    items: Sequence[Item]
    texts: Sequence[Sequence[str]]

    @cached_property
    def flat(self) -> list[tuple[Item, str]]:
        return [(item, text) for item, own in zip(self.items, self.texts, strict=True) for text in own]

    @cached_property
    def steps(self) -> list[list[str]]:
        return [split_solution(text) for _, text in self.flat]

    @cached_property
    def labels(self) -> list[list[bool]]:
        return [label_steps(steps, item.solution) for steps, (item, _) in zip(self.steps, self.flat, strict=True)]

    @cached_property
    def right(self) -> Array:
        """Whether the final answer is right, float64 [questions, answers]."""
        verdicts = verify_many([VerifyItem(VERIFIER, text, item.answer) for item, text in self.flat])
        return np.array([float(v.is_right) for v in verdicts]).reshape(len(self.items), -1)

    def write(self, folder: Path) -> Path:
        """stepwise.jsonl by the kind of label, in folders; an outcome is a label of all steps."""
        for kind in ("process", "outcome"):
            rows = [
                {
                    "prompt": item.prompt,
                    "completions": steps,
                    "labels": labels if kind == "process" else [bool(right)] * len(steps),
                }
                for (item, _), steps, labels, right in zip(
                    self.flat, self.steps, self.labels, self.right.ravel(), strict=True
                )
                if steps
            ]
            write_jsonl(folder / kind / "stepwise.jsonl", rows)
        return folder


def ask(base: Base, items: Sequence[Item], *, seed: int, draw: int, samples: int) -> Answers:
    prompts = [item.prompt for item in items]
    drawn = sample(base, prompts, seed=seed, draw=draw, samples=samples)
    return Answers(items, [texts for _, texts in group_texts(prompts, drawn)])


def prepare(seed: int) -> tuple[Path, Path, Answers]:
    """(the warm model, the labelled answers, the answers to held-out questions)."""
    sums, _, warm = reft.prepare(seed, "noisy")
    base, data = load(warm), sums.folder / PART / "data"
    if not (data / "outcome" / "stepwise.jsonl").is_file():  # written last
        drawn = (item for item in reft.draw_items(Random(f"{seed}/steps"), 10 * QUESTIONS) if item.task == TASK)
        items = list({item.prompt: item for item in islice(drawn, QUESTIONS)}.values())
        ask(base, items, seed=seed, draw=LABEL_DRAW, samples=PER_QUESTION).write(data)
    return warm, data, ask(base, build_benchmark(TASK, NUM_ITEMS), seed=seed, draw=TEST_DRAW, samples=max(BEST_OF))


# ---- models ----------------------------------------------------------------------------------------------------------


def train(seed: int, warm: Path, data: Path, name: str, arm: Arm) -> Path:
    settings = {
        "seed": seed,
        "separator": SEPARATOR,
        "holdout_share": 0.0,
        "epochs": arm.epochs,
        "bin_tokens": BIN_TOKENS,
        "optimizer": arm.build_optimizer(),
        "schedule": {"kind": "linear", "warmup_updates": 10},
        **arm.changes,
    }
    out = data.parent / f"{name}-{arm.rate:g}-{arm.epochs:g}"
    return run_stage("process_reward_model", out, settings, base=warm, data=data / arm.labels) / "model"


def score(model: Path, answers: Answers) -> list[Array]:
    """The probability that each step is right, for each answer; none where the model cannot read it."""
    pairs = [(item.prompt, text) for item, text in answers.flat]
    distinct = list(dict.fromkeys(pairs))
    found = load_process_reward_model(model).score_steps(
        [[{"role": "user", "content": prompt}] for prompt, _ in distinct],
        [split_solution(text) for _, text in distinct],
    )
    by_pair = dict(zip(distinct, found, strict=True))
    return [np.zeros(0) if isinstance(by_pair[pair], str) else by_pair[pair] for pair in pairs]


def rate_answers(rights: Sequence[Array], answers: Answers, aggregate: Aggregate) -> Array:
    """One score for each answer, [questions, answers]."""
    scores = [
        aggregate_steps(own, aggregate) if len(own) and extract_marked(text) else LOWEST
        for own, (_, text) in zip(rights, answers.flat, strict=True)
    ]
    return np.array(scores).reshape(answers.right.shape)


def evaluate(model: Path, answers: Answers, aggregate: Aggregate) -> dict[str, Any]:
    """Steps and first errors, and by n the share of right answers: of the best, and where scores vote."""
    rights = score(model, answers)
    read = [(own, np.array(true, float)) for own, true in zip(rights, answers.labels, strict=True) if len(own)]
    report = report_steps(*zip(*read, strict=True))
    tensors = [tensor for file in model.glob("*.safetensors") for tensor in load_file(file).values()]
    scores = rate_answers(rights, answers, aggregate)
    return {
        **{key: value for key, value in report.items() if key != "reliability"},
        "parameters": sum(tensor.numel() for tensor in tensors),
        "best": {str(n): float(compute_best_of(scores, answers.right, n).mean()) for n in BEST_OF},
        "vote": {str(n): vote(answers, np.maximum(scores, 0.0), n) for n in BEST_OF},
    }


def vote(answers: Answers, weights: Array, n: int) -> float:
    """Share of right answers where each n in turn vote for their final answers, [questions, answers] weights; of
    several with most votes one is drawn."""
    found = []
    for item, texts, own in zip(answers.items, answers.texts, weights, strict=True):
        for first in range(0, len(texts), n):
            votes: Counter[str] = Counter()
            for text, weight in zip(texts[first : first + n], own[first : first + n], strict=True):
                votes[extract_marked(text) or ""] += weight
            winners = [final for final, count in votes.items() if count >= max(votes.values()) - 1e-9]
            found.append(np.mean([final.split() == item.answer.split() for final in winners]))
    return float(np.mean(found))


def describe(answers: Answers) -> dict[str, dict[str, float]]:
    """What can be had without a model, by n."""
    ones = np.ones_like(answers.right)
    return {
        "majority": {str(n): vote(answers, ones, n) for n in BEST_OF},
        "any": {str(n): float(compute_best_of(answers.right, answers.right, n).mean()) for n in BEST_OF},
    }


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    missing = [name for name in ARMS if name not in row["arms"]]
    if not missing:
        return
    warm, data, answers = prepare(seed)
    row["without"] = describe(answers)
    for name in missing:
        row["arms"][name] = evaluate(train(seed, warm, data, name, ARMS[name]), answers, ARMS[name].aggregate)
        write_row(path, row)
        print(f"{PART} seed {seed} {name}: {row['arms'][name]['best']}", flush=True)


def tune(wanted: Sequence[str]) -> None:
    """Arms as ARM, ARM:RATE or ARM:RATE:EPOCHS on the tuning seeds; what is chosen goes to ARMS and the log."""
    for seed in TUNING_SEEDS:
        warm, data, answers = prepare(seed)
        print(f"seed {seed} {describe(answers)}", flush=True)
        for name, *given in (text.split(":") for text in wanted):
            settings = {key: float(value) for key, value in zip(("rate", "epochs"), given, strict=False)}
            arm = replace(ARMS[name], **settings)
            model = train(seed, warm, data, name, arm)
            for aggregate in ("last",) if name == "orm" else AGGREGATES:
                found = evaluate(model, answers, aggregate)
                numbers = [found["accuracy"], found["first_error_f1"]]
                numbers += [found[kind][n] for kind in ("best", "vote") for n in SHOWN]
                cells = [f"{100 * number:.1f}" for number in numbers]
                head = f"| {name} | {arm.rate:g} | {arm.epochs:g} | {aggregate} | {seed} | "
                print(head + " | ".join(cells) + " |", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def read_values() -> list[dict[tuple[str, str], float]]:
    """For each seed, in per cent: (arm or control, metric) -> value."""
    found = []
    for row in read_rows(PART, MY_SEEDS):
        arms, without = row["arms"], row["without"]
        if not arms.keys() >= ARMS.keys():
            continue
        values = {("commoner label", "step accuracy"): arms["prm"]["majority_accuracy"]}
        for n in map(str, BEST_OF):
            values["one sample", f"best of {n}"] = without["majority"]["1"]
            values["any right (the bound)", f"best of {n}"] = without["any"][n]
            for kind in ("best", "vote"):
                values["majority vote", f"{kind} of {n}"] = without["majority"][n]
                values |= {(name, f"{kind} of {n}"): arm[kind][n] for name, arm in arms.items()}
        values |= {(name, "step accuracy"): arm["accuracy"] for name, arm in arms.items()}
        values |= {(name, "first-error F1"): arm["first_error_f1"] for name, arm in arms.items()}
        found.append({key: 100 * value for key, value in values.items()})
    return found


def list_claims() -> Iterator[tuple[str, str, str, str, float]]:
    """(claim, metric, arm, control, what is added to the difference); higher is better in all."""
    for n in SHOWN:
        best, vote = f"best of {n}", f"vote of {n}"
        for arm in ARMS:
            yield f"the {best} by {WORDS[arm]} is right more often than one sample", best, arm, "one sample", 0
            words = f"{n} answers whose votes {WORDS[arm]} weighs are right more often than their majority"
            yield words, vote, arm, "majority vote", 0
        yield f"the {best} by the PRM is right more often than their majority", best, "prm", "majority vote", 0
        yield f"the {best} by the PRM is right more often than by the ORM of as many answers", best, "prm", "orm", 0
        words = f"{n} answers are right more often if the PRM weighs their votes than if the ORM does"
        yield words, vote, "prm", "orm", 0
        for metric, words in ((best, f"the {best}"), (vote, f"the weighed {vote}")):
            words = f"the LoRA PRM loses less than {MARGIN:g} points of {words} against the PRM"
            yield words, metric, "lora", "prm", MARGIN
    for arm in ("prm", "lora"):
        steps, first = "step accuracy", "first-error F1"
        yield f"{WORDS[arm]} judges more steps rightly than their commoner label does", steps, arm, "commoner label", 0
        yield f"{WORDS[arm]} finds first errors better than the ORM read at each step", first, arm, "orm", 0


def build_claims() -> list[dict[str, Any]]:
    seeds = read_values()
    return [
        build_claim(
            claim,
            metric=f"{PART}/{metric} (points{f', plus {added:g}' if added else ''})",
            arm=arm,
            control=control,
            differences=[values[arm, metric] - values[control, metric] + added for values in seeds],
            better="higher",
        )
        for claim, metric, arm, control, added in (list_claims() if len(seeds) > 1 else ())
    ]


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    seeds, rows = read_values(), read_rows(PART, MY_SEEDS)
    metrics = ["step accuracy", "first-error F1", *(f"{kind} of {n}" for kind in ("best", "vote") for n in SHOWN)]
    heads = " | ".join(f"{metric}, %" for metric in metrics)
    lines = [f"| arm | {heads} | trained parameters |", "|---" * (len(metrics) + 2) + "|"]
    for name in (*ARMS, "commoner label", "one sample", "majority vote", "any right (the bound)"):
        known = [metric for metric in metrics if (name, metric) in seeds[0]]
        means = {metric: f"{np.mean([values[name, metric] for values in seeds]):.1f}" for metric in known}
        trained = f"{rows[0]['arms'][name]['parameters']:,}" if name in ARMS else ""
        lines.append(f"| {name} | " + " | ".join(means.get(metric, "") for metric in metrics) + f" | {trained} |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Right answers by n, means over the seeds; step accuracy and first-error F1, a point a seed."""
    del claims
    seeds = read_values()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 2))
    curves = [(arm, "best", f"best by {words}") for arm, words in WORDS.items()]
    curves += [(arm, "vote", f"vote weighed by {words}") for arm, words in WORDS.items()]
    curves += [("majority vote", "vote", "majority vote"), ("any right (the bound)", "best", "any right (the bound)")]
    for place, (name, kind, words) in enumerate(curves):
        means = [np.mean([values[name, f"{kind} of {n}"] for values in seeds]) for n in BEST_OF]
        color = f"C{place % len(WORDS)}" if name in ARMS else "0.3" if kind == "vote" else "0.7"
        left.plot(BEST_OF, means, "o-" if kind == "best" else "s--", color=color, label=words, markersize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(BEST_OF, [str(n) for n in BEST_OF])
    left.set_xlabel("answers sampled to each question, n")
    left.set_ylabel("right answers to held-out questions, %")
    left.legend(fontsize=7)
    metrics = ("step accuracy", "first-error F1")
    for shift, (arm, words) in enumerate(WORDS.items()):
        points = [(place + 0.2 * (shift - 1), values[arm, m]) for place, m in enumerate(metrics) for values in seeds]
        right.plot(*zip(*points, strict=True), "o", color=f"C{shift}", alpha=0.6, label=words)
    commoner = np.mean([values["commoner label", "step accuracy"] for values in seeds])
    right.plot([-0.4, 0.4], [commoner] * 2, color="0.3", linewidth=1, label="commoner label")
    right.set_xticks(range(len(metrics)), metrics)
    right.set_xlim(-0.5, 1.5)
    right.set_ylim(0, 100)
    right.set_ylabel("held-out answers, % (a point a seed)")
    right.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(HERE / f"{PART}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or tuple(ARMS))
