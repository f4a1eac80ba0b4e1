"""Compare each adapter with full fine-tuning: accuracy, trained parameters, time and memory.

python evidence/adapters/run.py tune      # learning rates on seeds 0 and 1, into tuning.json
python evidence/adapters/run.py bases     # only the bases of the seeds of recipe.yaml (also while it tunes)
python evidence/adapters/run.py seeds     # the seeds of recipe.yaml at those rates, one file a seed
python evidence/adapters/run.py seeds 100 101    # some seeds only
python evidence/adapters/run.py memory    # peak memory and time of a larger model, a process for each
python evidence/adapters/run.py table     # only add up what is there: result.json, figure.png and the tables

A seed whose file is in seeds/ is not run again, and a run that was stopped goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from polm.config import Settings, load_settings
from polm.evals.claims import build_claim, write_claims
from polm.evals.statistics import compute_mean_stderr, compute_t_interval
from polm.flywheel.graph import seeded
from polm.flywheel.store import Work, execute, external_key
from polm.recipe import ModelShape, PretrainSettings, Recipe, SFTSettings
from polm.recipe_data import DataStage
from polm.stages.common import Context, Report
from polm.stages.table import STAGES

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs" / "adapters"
TUNING = HERE / "tuning.json"
MEMORY = HERE / "memory.json"
TUNING_SEEDS = (0, 1)
MEMORY_SEEDS = (100, 101, 102)
FULL = "full fine-tuning"
BEFORE = "before SFT"
QLORA = "QLoRA"
LORA = {"kind": "lora", "rank": 8, "alpha": 16}
# What is compared, and the learning rates that are tried.
KINDS: dict[str, tuple[dict[str, Any] | None, tuple[float, ...]]] = {
    FULL: (None, (5e-4, 1e-3, 2e-3)),
    "LoRA": (LORA, (5e-3, 1e-2, 2e-2)),
    "rsLoRA": ({**LORA, "rslora": True}, (2e-3, 5e-3, 1e-2)),
    "DoRA": ({**LORA, "dora": True}, (5e-3, 1e-2, 2e-2)),
    QLORA: ({**LORA, "quantize": "nf4"}, ()),  # needs the extra qlora; LoRA's rate
    "IA3": ({"kind": "ia3"}, (3e-2, 1e-1, 3e-1)),
    "prefix tuning": ({"kind": "prefix", "virtual_tokens": 16}, (3e-2, 1e-1, 3e-1)),
    "prompt tuning": ({"kind": "prompt", "virtual_tokens": 16}, (1e-2, 3e-2, 1e-1)),
    "P-tuning": ({"kind": "p_tuning", "virtual_tokens": 16}, (1e-3, 3e-3, 1e-2)),
}
# 26 M parameters: large enough that the optimizer's state, and not the program, is most of what is held.
LARGE = ModelShape(
    hidden_size=512, num_layers=8, num_heads=8, num_key_value_heads=8, intermediate_size=1536, max_positions=512
)


def run_stage(
    stage: str, settings: Settings, inputs: Mapping[str, Path], folder: Path, report: Report = lambda _: None
) -> dict[str, Any]:
    """One stage into `folder`; returns its manifest."""
    given = {role: str(path) for role, path in inputs.items()}
    keys = {role: external_key(path) for role, path in given.items()}
    work = Work(STAGES[stage], settings, given, keys, folder)
    return execute(work, Context(folder, given, report=report, say=lambda _: None))


def run_timed(settings: SFTSettings, inputs: Mapping[str, Path], folder: Path) -> tuple[dict[str, Any], float]:
    """An SFT and the processor's seconds of one update: other work beside it makes the wall clock useless.

    The first update is left out. The time lies beside the artifact; without it the artifact is made anew.
    """
    note = folder.with_name(f"{folder.name}.cpu.json")
    if not note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
    clock: list[float] = []
    manifest = run_stage("sft", settings, inputs, folder, lambda _: clock.append(time.process_time()))
    if len(clock) > 1:
        note.write_text(json.dumps((clock[-1] - clock[0]) / (len(clock) - 1)))
    return manifest, float(json.loads(note.read_text()))


def build_base(recipe: Recipe, seed: int) -> tuple[Path, Path]:
    """(data, base) of a seed."""
    here = RUNS / f"s{seed}"
    data, tokenizer, first, base = (here / name for name in ("data", "tokenizer", "pretrain", "midtrain"))
    drawn = recipe.data.model_copy(update={"seed": seed})
    run_stage("data", DataStage(data=drawn), {}, data)
    run_stage("tokenizer", recipe.tokenizer, {"data": data}, tokenizer)
    run_stage("pretrain", seeded(recipe.pretrain, seed), {"data": data, "tokenizer": tokenizer}, first)
    run_stage("midtrain", seeded(recipe.midtrain, seed), {"data": data, "base": first}, base)
    return data, base


def tune_sft(recipe: Recipe, kind: str, rate: float, seed: int) -> SFTSettings:
    """The recipe's SFT with an adapter and a learning rate."""
    values = {**recipe.sft.model_dump(), "adapter": KINDS[kind][0], "seed": seed}
    values["optimizer"]["learning_rate"] = rate
    return SFTSettings.model_validate(values)


def measure(recipe: Recipe, kind: str, rate: float, seed: int, *, timed: bool = False) -> dict[str, float]:
    """SFT and its evaluation: accuracy in points, NLL, trained parameters, MB on disk, seconds an update."""
    data, base = build_base(recipe, seed)
    here = RUNS / f"s{seed}" / f"{kind.replace(' ', '_')}-{rate:g}"
    settings, inputs = tune_sft(recipe, kind, rate, seed), {"base": base, "data": data}
    if timed:
        sft, seconds = run_timed(settings, inputs, here / "sft")
    else:
        sft, seconds = run_stage("sft", settings, inputs, here / "sft"), 0.0
    chat = recipe.eval.model_copy(update={"format": "chat", "seed": seed})
    scores = run_stage("eval", chat, {"model": here / "sft", "data": data}, here / "eval")
    summary = sft["summary"]
    size = sum(path.stat().st_size for path in (here / "sft" / "model").glob("*.safetensors"))
    return {
        "accuracy": 100.0 * scores["summary"]["mean/greedy"],
        "nll": scores["summary"]["mean/nll"],
        "trained": summary.get("trained_parameters", summary["parameters"]),
        "seconds": seconds,
        "megabytes": size / 1e6,
    }


def measure_base(recipe: Recipe, seed: int) -> dict[str, float]:
    """The base before any SFT, in the same form."""
    data, base = build_base(recipe, seed)
    chat = recipe.eval.model_copy(update={"format": "chat", "seed": seed})
    scores = run_stage("eval", chat, {"model": base, "data": data}, RUNS / f"s{seed}" / "eval_base")["summary"]
    return {"accuracy": 100.0 * scores["mean/greedy"], "nll": scores["mean/nll"]}


def tune(recipe: Recipe) -> None:
    """Each kind's rate, by the likelihood of held-out solutions: all on the first tuning seed, the best two on the
    second, too. All numbers stay in the file."""
    second = TUNING_SEEDS[1]
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in TUNING_SEEDS:
        for kind, (_, rates) in KINDS.items():
            if not rates:
                continue
            best = sorted(rates, key=lambda rate: rows[kind][f"{rate:g}"][0])[:2] if seed == second else rates
            for rate in best:
                found = measure(recipe, kind, rate, seed)
                rows.setdefault(kind, {}).setdefault(f"{rate:g}", []).append(round(found["nll"], 5))
                print(f"seed {seed} {kind} {rate:g}: {found['nll']:.4f}, {found['accuracy']:.1f} %", flush=True)
    chosen = {}
    for kind, by_rate in rows.items():
        both = {rate: values for rate, values in by_rate.items() if len(values) == len(TUNING_SEEDS)}
        chosen[kind] = float(min(both, key=lambda rate: float(np.mean(both[rate]))))
    chosen[QLORA] = chosen["LoRA"]
    TUNING.write_text(json.dumps({"seeds": TUNING_SEEDS, "nll": rows, "chosen": chosen}, indent=1) + "\n")


def measure_memory(kind: str, seed: int, folder: str, answers: Any) -> None:
    """In a process of its own: three updates of SFT on a model with random weights."""
    recipe = load_settings(Recipe, HERE / "recipe.yaml")
    data = RUNS / f"s{seed}" / "data"
    rate = json.loads(TUNING.read_text())["chosen"][kind]
    changes = {"updates": 3, "epochs": None, "bin_tokens": 512}
    settings = tune_sft(recipe, kind, rate, seed).model_copy(update=changes)
    out = Path(folder) / kind.replace(" ", "_")
    manifest, seconds = run_timed(settings, {"base": Path(folder) / "base", "data": data}, out)
    answers.put({"megabytes": manifest["peak_rss_mb"], "seconds": seconds})


def run_memory(recipe: Recipe) -> None:
    """Every kind on the larger model, one process after another."""
    context = multiprocessing.get_context("spawn")
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in MEMORY_SEEDS:
        data, _ = build_base(recipe, seed)
        folder = RUNS / f"s{seed}" / "large"
        start = PretrainSettings(model=LARGE, updates=1, bin_tokens=256, precision="fp32", seed=seed)
        run_stage("pretrain", start, {"data": data, "tokenizer": RUNS / f"s{seed}" / "tokenizer"}, folder / "base")
        for kind in KINDS:
            answers = context.Queue()
            child = context.Process(target=measure_memory, args=(kind, seed, str(folder), answers))
            child.start()
            found = answers.get(timeout=300)
            child.join()
            for name, value in found.items():
                rows.setdefault(kind, {}).setdefault(name, []).append(round(value, 3))
            print(f"seed {seed} {kind}: {found['megabytes']:.0f} MB, {found['seconds']:.2f} s an update", flush=True)
    MEMORY.write_text(json.dumps({"seeds": MEMORY_SEEDS, "kinds": rows}, indent=1) + "\n")


def run_seeds(recipe: Recipe, seeds: Sequence[int]) -> None:
    """Every kind at its rate, seed by seed."""
    chosen = json.loads(TUNING.read_text())["chosen"]
    for seed in seeds:
        path = HERE / "seeds" / f"{seed}.json"
        if path.is_file():
            continue
        found = {kind: measure(recipe, kind, chosen[kind], seed, timed=True) for kind in KINDS}
        path.parent.mkdir(exist_ok=True)
        row = {"seed": seed, "before": measure_base(recipe, seed), "kinds": found, "cores": os.cpu_count()}
        path.write_text(json.dumps(row, indent=1) + "\n")
        print(f"seed {seed}: " + ", ".join(f"{k} {v['accuracy']:.1f}" for k, v in found.items()), flush=True)


def read_seeds() -> list[dict[str, dict[str, float]]]:
    """Per seed the numbers of every kind, and of the base under the name BEFORE."""
    rows = [json.loads(path.read_text()) for path in sorted((HERE / "seeds").glob("*.json"))]
    return [{**row["kinds"], BEFORE: row["before"]} for row in rows]


def build_claims(rows: Sequence[Mapping[str, Any]], memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each adapter against full fine-tuning, and the variants of LoRA against LoRA."""
    claims = []

    def add(claim: str, metric: str, arm: str, control: str, values: Sequence[float], better: Any) -> None:
        claims.append(build_claim(claim, metric=metric, arm=arm, control=control, differences=values, better=better))

    for kind in KINDS:
        if kind == FULL:
            continue
        worse = [row[kind]["accuracy"] - row[FULL]["accuracy"] for row in rows]
        add(f"{kind} answers worse than {FULL}", "greedy accuracy after SFT (points)", kind, FULL, worse, "lower")
        less = [row[kind]["nll"] - row[FULL]["nll"] for row in rows]
        words = f"{kind} finds held-out solutions less likely than {FULL}"
        add(words, "NLL of held-out solutions (nats/token)", kind, FULL, less, "higher")
        slower = [100.0 * (row[kind]["seconds"] / row[FULL]["seconds"] - 1.0) for row in rows]
        words = f"an update of {kind} takes another time than one of {FULL}, model of 0.4 M parameters"
        add(words, "processor time an update (percent)", kind, FULL, slower, "either")
        mine, full = memory[kind], memory[FULL]
        held = [a - b for a, b in zip(mine["megabytes"], full["megabytes"], strict=True)]
        add(f"{kind} holds less memory than {FULL}", "peak memory (MB), 26 M parameters", kind, FULL, held, "lower")
        time = [100.0 * (a / b - 1.0) for a, b in zip(mine["seconds"], full["seconds"], strict=True)]
        words = f"an update of {kind} takes another time than one of {FULL}, model of 26 M parameters"
        add(words, "processor time an update (percent)", kind, FULL, time, "either")
    held = [a - b for a, b in zip(memory[QLORA]["megabytes"], memory["LoRA"]["megabytes"], strict=True)]
    add("QLoRA holds less memory than LoRA", "peak memory (MB), 26 M parameters", QLORA, "LoRA", held, "lower")
    for kind in ("rsLoRA", "DoRA", QLORA):
        gain = [row[kind]["nll"] - row["LoRA"]["nll"] for row in rows]
        words = f"{kind} finds held-out solutions more likely than LoRA"
        add(words, "NLL of held-out solutions (nats/token)", kind, "LoRA", gain, "lower")
    return claims


def write_table(rows: Sequence[Mapping[str, Any]], memory: Mapping[str, Any]) -> str:
    """Markdown: means over the seeds with their standard errors, differences with 95 % t intervals."""
    lines = [
        "| | NLL, nats/token | over full | accuracy, % | over full, points | trained | file, MB | "
        "time an update, x full | at 26 M: time, x full | peak memory, MB |",
        "|---" * 10 + "|",
    ]
    for kind in KINDS:
        cells = []
        for name, digits in (("nll", 4), ("accuracy", 1)):
            spread = compute_mean_stderr([row[kind][name] for row in rows])
            gap = compute_t_interval([row[kind][name] - row[FULL][name] for row in rows])
            cells.append(f"{spread.mean:.{digits}f} ± {spread.stderr:.{digits}f}")
            low, high = f"{gap.low95:+.{digits}f}", f"{gap.high95:+.{digits}f}"
            cells.append(f"{gap.mean_difference:+.{digits}f} ({low} to {high})" if kind != FULL else "·")
        ratio = np.mean([row[kind]["seconds"] / row[FULL]["seconds"] for row in rows])
        large = np.mean(np.array(memory[kind]["seconds"]) / np.array(memory[FULL]["seconds"]))
        peak = np.mean(memory[kind]["megabytes"])
        lines.append(
            f"| {kind} | {' | '.join(cells)} | {rows[0][kind]['trained']:,.0f} | "
            f"{rows[0][kind]['megabytes']:.3f} | {ratio:.2f} | {large:.2f} | {peak:,.0f} |"
        )
    before = {name: np.mean([row[BEFORE][name] for row in rows]) for name in ("nll", "accuracy")}
    lines.append(f"\nBefore SFT: NLL {before['nll']:.3f}, accuracy {before['accuracy']:.1f} %.")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Likelihood and accuracy of each adapter: differences to full fine-tuning with 95 % t intervals over the seeds."""
    kinds = [kind for kind in KINDS if kind != FULL]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    panels = (
        ("nll", "NLL of held-out solutions, nats/token (less is better)"),
        ("accuracy", "greedy accuracy, points (more is better)"),
    )
    for axis, (name, label) in zip(axes, panels, strict=True):
        for place, kind in enumerate(kinds):
            gap = compute_t_interval([row[kind][name] - row[FULL][name] for row in rows])
            mean = gap.mean_difference
            axis.errorbar(mean, place, xerr=[[mean - gap.low95], [gap.high95 - mean]], fmt="o", capsize=3, color="C0")
        axis.axvline(0, color="0.5", linewidth=1)
        axis.set_xlabel(f"over full fine-tuning: {label}", fontsize=8)
    trained = [f"{kind} ({rows[0][kind]['trained']:,.0f})" for kind in kinds]
    axes[0].set_yticks(range(len(kinds)), trained, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"in brackets: trained parameters, of {rows[0][FULL]['trained']:,.0f}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    word, *numbers = sys.argv[1:] or ["table"]
    recipe = load_settings(Recipe, HERE / "recipe.yaml")
    seeds = [int(number) for number in numbers] or list(recipe.seeds)
    if word == "tune":
        tune(recipe)
    elif word == "bases":
        for seed in seeds:
            build_base(recipe, seed)
    elif word == "seeds":
        run_seeds(recipe, seeds)
    elif word == "memory":
        run_memory(recipe)
    elif word != "table":
        raise SystemExit(f"unknown word {word}: expected tune, bases, seeds, memory or table")
    rows = read_seeds()
    if rows and MEMORY.is_file():
        memory = json.loads(MEMORY.read_text())["kinds"]
        write_claims(HERE / "result.json", build_claims(rows, memory))
        print(write_table(rows, memory))
        draw(rows, HERE / "figure.png")


if __name__ == "__main__":
    main()
