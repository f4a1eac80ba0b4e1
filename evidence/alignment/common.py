"""What the parts share: the model of a seed (data, base, SFT), sampling, measuring by gold, files that outlive a kill.

Everything lies under runs/alignment/SEED and is made once, by polm's own stages; a part writes one file a seed,
after every arm, which comes into seeds/ when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from task import Gold, build, gold, label_answers, label_pairs

from polm.config import Settings
from polm.data.packing import mix_seed
from polm.data.readers import read_prompts, write_jsonl
from polm.engine.annotate import annotate_trees
from polm.engine.device import use_bf16
from polm.evals.claims import build_claim
from polm.flywheel.store import Work, collect_versions, execute, external_key
from polm.recipe import ModelShape, PretrainSettings, SFTSettings, TokenizerSettings
from polm.rollout.generate import Completion, SamplingParams, generate
from polm.stages.common import Base, Context, Report, load_base
from polm.stages.table import STAGES
from polm.text.chat import render_prompt, stop_token_ids
from polm.tokens import Array, build_completions

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs" / "alignment"
TUNING_SEEDS, SEEDS = (0, 1), (100, 101, 102, 103, 104)
BIN_TOKENS, MAX_NEW_TOKENS = 1536, 80
NOISE = 1.0  # of the labellers: a point of gold makes a preference of 73 %

SHAPE = ModelShape(
    hidden_size=128, num_layers=2, num_heads=4, num_key_value_heads=4, intermediate_size=384, max_positions=256
)
PRETRAIN = {
    "updates": 240,
    "bin_tokens": BIN_TOKENS,
    "optimizer": {"kind": "muon", "learning_rate": 0.012, "embedding_learning_rate": 0.003},
    "schedule": {"kind": "wsd", "warmup_updates": 20, "decay_share": 0.3},
}
SFT = {
    "epochs": 1,
    "bin_tokens": BIN_TOKENS,
    "optimizer": {"kind": "muon", "learning_rate": 0.004, "embedding_learning_rate": 0.001},
    "schedule": {"kind": "linear"},
}
# Which draw: each has noise of its own.
PAIR_SAMPLES, MEASURE = 11, 12


def silent(line: object) -> None:
    del line


# ---- stages ----------------------------------------------------------------------------------------------------------


def run_stage(
    name: str, folder: Path, settings: Settings | Mapping[str, Any], report: Report = silent, **inputs: Path
) -> Path:
    """Run a stage of polm into `folder`, unless it is there; returns the folder. `report` gets its lines."""
    stage = STAGES[name]
    typed = settings if isinstance(settings, Settings) else stage.settings.model_validate(dict(settings))
    given = {role: str(path) for role, path in inputs.items()}
    keys = {role: external_key(path) for role, path in given.items()}
    execute(Work(stage, typed, given, keys, folder), Context(folder, given, report, silent))
    return folder


@dataclass(frozen=True)
class World:
    """Where the things of a seed lie."""

    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / f"seed-{self.seed}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def base(self) -> Path:
        return self.folder / "pretrain"

    @property
    def sft(self) -> Path:
        return self.folder / "sft"


def prepare(seed: int) -> World:
    """Data, tokenizer, base and SFT model of a seed; what is there is left as it is."""
    world = World(seed)
    if not (world.data / "held_out" / "prompts.jsonl").is_file():  # the file that is written last
        build(world.data, seed)
    tokenizer = run_stage(
        "tokenizer", world.folder / "tokenizer", TokenizerSettings(kind="word", vocab_size=200), data=world.data
    )
    settings = PretrainSettings.model_validate({"seed": seed, "model": SHAPE, **PRETRAIN})
    run_stage("pretrain", world.base, settings, data=world.data, tokenizer=tokenizer)
    run_stage("sft", world.sft, SFTSettings.model_validate({"seed": seed, **SFT}), data=world.data, base=world.base)
    return world


# ---- samples ---------------------------------------------------------------------------------------------------------


def read_questions(folder: Path, count: int | None = None, first: int = 0) -> list[str]:
    prompts = [prompt.prompt for prompt in read_prompts(folder / "prompts.jsonl")]
    return prompts[first : None if count is None else first + count]


def sample(base: Base, prompts: Sequence[str], *, seed: int, draw: int, samples: int = 1) -> list[Completion]:
    """Answers at temperature 1. What is drawn depends on (seed, draw, prompt, sample) and the model only."""
    torch.set_num_threads(1)
    return generate(
        base.model,
        base.tokenizer,
        encode_prompts(base, prompts),
        SamplingParams(
            max_new_tokens=MAX_NEW_TOKENS,
            num_samples=samples,
            seed=mix_seed(seed, draw),
            stop_token_ids=stop_token_ids(base.tokenizer),
        ),
    )


def encode_prompts(base: Base, prompts: Sequence[str]) -> list[Array]:
    return [render_prompt(base.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]


def group_texts(prompts: Sequence[str], completions: Sequence[Completion]) -> list[tuple[str, list[str]]]:
    """(prompt, its texts) in the order of the prompts."""
    texts: list[list[str]] = [[] for _ in prompts]
    for completion in completions:
        texts[completion.prompt_index].append(completion.text)
    return list(zip(prompts, texts, strict=True))


def compute_logprobs(base: Base, prompts: Sequence[str], completions: Sequence[Completion]) -> Array:
    """log p of each completion under a model, summed over its tokens, [completions]."""
    encoded = encode_prompts(base, prompts)
    trees = [build_completions(encoded[c.prompt_index], [c.tokens]) for c in completions]
    scores = annotate_trees(base.model, trees, bin_tokens=4096).logprobs
    ends = np.cumsum([sum(map(len, tree)) for tree in trees])
    return np.array([part.sum() for part in np.split(scores, ends[:-1])])


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One answer to each of the prompts, with its points."""

    completions: Sequence[Completion]
    golds: Sequence[Gold]

    @property
    def scores(self) -> Array:
        return np.array([g.score for g in self.golds])


def measure(base: Base, world: World, prompts: Sequence[str], draw: int = MEASURE) -> Measured:
    completions = sample(base, prompts, seed=world.seed, draw=draw)
    return Measured(completions, [gold(prompts[c.prompt_index], c.text) for c in completions])


def describe(measured: Measured) -> dict[str, float]:
    """Means over the prompts."""
    golds = measured.golds
    return {
        "gold": float(measured.scores.mean()),
        "helpfulness": float(np.mean([g.helpfulness for g in golds])),
        "violations": float(np.mean([g.violations > 0 for g in golds])),
        "words": float(np.mean([len(c.text.replace(".", " ").split()) for c in measured.completions])),
        **{f"part/{name}": float(np.mean([g.parts[name] for g in golds])) for name in golds[0].parts},
    }


def compare(arm: Measured, control: Measured) -> float:
    """Share of prompts on which the arm's gold is higher; equal ones count half."""
    return float(np.mean((arm.scores > control.scores) + 0.5 * (arm.scores == control.scores)))


def describe_against(arm: Measured, control: Measured, reference: Base, prompts: Sequence[str]) -> dict[str, float]:
    """`describe`, the win rate against the control, and KL(arm || reference) in nats an answer, from the samples."""
    own = np.array([c.logprobs.sum() for c in arm.completions])
    kl = own - compute_logprobs(reference, prompts, arm.completions)
    return {**describe(arm), "win_rate": compare(arm, control), "kl": float(kl.mean())}


# ---- preference data -------------------------------------------------------------------------------------------------


def write_labels(
    folder: Path, base: Base, prompts: Sequence[str], *, seed: int, draw: int = PAIR_SAMPLES, noise: float = NOISE
) -> Path:
    """Two of the model's own answers to each prompt, labelled: preferences.jsonl, and judged alone feedback/."""
    if not (folder / "preferences.jsonl").is_file():
        grouped = group_texts(prompts, sample(base, prompts, seed=seed, draw=draw, samples=2))
        write_jsonl(folder / "feedback" / "feedback.jsonl", label_answers(grouped, noise, seed))
        write_jsonl(folder / "preferences.jsonl", label_pairs(grouped, noise, seed))
    return folder


# ---- files of a part -------------------------------------------------------------------------------------------------


def read_rows(part: str, seeds: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The files of a part, by seed; of the reporting seeds alone unless others are named."""
    wanted = SEEDS if seeds is None else seeds
    paths = [HERE / "seeds" / f"{part}-{seed}.json" for seed in wanted]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def claim_difference(
    words: str,
    rows: Sequence[Mapping[str, Mapping[str, float]]],
    *,
    key: str,
    arm: str,
    control: str,
    metric: str,
    scale: float = 1.0,
    better: Literal["higher", "lower", "either"] = "higher",
) -> list[dict[str, Any]]:
    """The claim about `key` of an arm against a control, times `scale`; none with less than two seeds that have both.

    rows   of each seed what was measured, by arm
    """
    both = [arms for arms in rows if arm in arms and control in arms]
    if len(both) < 2:
        return []
    differences = [scale * (arms[arm][key] - arms[control][key]) for arms in both]
    return [build_claim(words, metric=metric, arm=arm, control=control, differences=differences, better=better)]


def read_row(path: Path) -> dict[str, Any]:
    """What a file of a part holds so far."""
    row: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"arms": {}}
    return row


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write the file of a seed, whole or not at all. `bf16` says whether training multiplied in it here, as
    `precision: auto` has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        json.dumps({**row, "versions": collect_versions(), "bf16": use_bf16("auto", "cpu")}, indent=1) + "\n"
    )
    temporary.replace(path)


def load(folder: Path) -> Base:
    return load_base(str(folder))
