"""A synthetic run folder, as the flywheel would have written it, for the tests of the report."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

POINT_OF_LEAF = {"base": "midtrain", "sft": "sft", "dpo": "dpo", "rl": "grpo"}
ARM_STEPS = ("midtrain", "sft", "pairs", "dpo", "grpo")
HOSTILE = "</script><img src=x onerror=alert(1)>\"'`&lt; \u202edesrever\u2066 \x00\x1b[31mred\x07 <svg onload=alert(2)>"


class RunBuilder:
    """Writes nodes, manifests, metrics and evaluations; every number comes from one seeded generator."""

    def __init__(self, run_dir: Path, benchmarks: list[str], num_items: int, text: str) -> None:
        self.run_dir, self.benchmarks, self.num_items, self.text = run_dir, benchmarks, num_items, text
        self.nodes: list[dict[str, Any]] = []
        self.random = random.Random(0)

    def add(self, node_id: str, stage: str, inputs: dict[str, str], *, done: bool = True, **place: Any) -> Path:
        key = f"{random.Random(node_id).getrandbits(256):064x}"
        artifact = f"store/{stage}-{key[:12]}"
        config = {"eps": 0.8, "weighting": place.get("arm")} if stage == "midtrain" else {}
        self.nodes.append(
            {
                "id": node_id,
                "stage": stage,
                "key": key,
                "artifact": artifact,
                "inputs": inputs,
                "config": config,
                **place,
            }
        )
        folder = self.run_dir / artifact
        if done:
            folder.mkdir(parents=True)
            ledger = {"tokens_kept": 240_000, "read": 8000, "tokens_read": 250_000, "dropped": 0, "tokens_lost": 1_000}
            manifest = {
                "key": key,
                "stage": stage,
                "version": "1",
                "config": config,
                "inputs": dict.fromkeys(inputs, "0" * 64),
                "files": {},
                "started": "2025-01-01T00:00:00",
                "finished": f"2025-01-01T00:{len(self.nodes) % 60:02d}:00",
                "seconds": self.random.uniform(1, 100),
                "peak_rss_mb": self.random.uniform(300, 1500),
                "threads": 1,
                "summary": {"loss": 1.0},
                "ledger": ledger if stage not in ("eval", "tokenizer") else {},
            }
            (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    def add_metrics(self, folder: Path, name: str, arm: str | None, num_updates: int = 40) -> None:
        lines = []
        for update in range(1, num_updates + 1):
            line: dict[str, Any] = {
                "update": update,
                "num_updates": num_updates,
                "tokens": update * 1536,
                "seconds": update * 0.1,
                "tokens_per_second": 15000.0 + self.random.gauss(0, 300),
                "eta_seconds": (num_updates - update) * 0.1,
                "lr": 0.012 * (1 - update / num_updates),
                "loss": 1.2 + 2.0 / (1 + update / 5) + self.random.gauss(0, 0.03),
                "grad_norm": abs(self.random.gauss(0.6, 0.1)),
            }
            if name == "grpo":
                line["rl/reward"] = min(1.0, 0.3 + 0.01 * update + self.random.gauss(0, 0.02))
                line["rl/entropy"] = 0.8 / (1 + update / 20)
            if name == "midtrain":
                line["ntp/nll"] = line["loss"] - (0.0005 * update if arm != "ntp" else 0.0)
            if name == "midtrain" and arm == "remit":
                line["remit/clip_fraction"] = 0.1 + 0.002 * update
                line["remit/mean_abs_delta"] = 0.3 + self.random.gauss(0, 0.02)
                line["remit/weight_histogram"] = [0.0, 0.0, 0.12, 0.18, 0.2, 0.2, 0.18, 0.12, 0.0, 0.0]
            lines.append(json.dumps(line))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def add_evaluation(self, folder: Path, point: str, skill: float, seed: int) -> None:
        items, scores = [], {}
        for benchmark in self.benchmarks:
            for index in range(self.num_items):
                # An item is as hard for every model, so that the models' answers are correlated as real ones are.
                hardness = random.Random(f"{benchmark}/{index}/{seed}").random()
                chance = 1 / (1 + 2.718 ** (10 * (hardness - skill)))
                samples = [int(self.random.random() < chance) for _ in range(8)]
                greedy = int(self.random.random() < chance)
                items.append(
                    {
                        "benchmark": benchmark,
                        "id": f"{index:03d}",
                        "prompt": f"What is {index} plus {index}? {self.text}",
                        "answer": str(2 * index),
                        "greedy_text": f"{index} + {index} = {2 * index}. #### {2 * index - 1 + greedy} {self.text}",
                        "greedy_status": "right" if greedy else "wrong",
                        "greedy_correct": greedy,
                        "samples_correct": samples,
                        "samples_text": ["a"] * 8,
                        "nll": 6.0 * (1.3 - skill) + hardness,
                        "nll_tokens": 12,
                    }
                )
            mine = items[-self.num_items :]
            scores[benchmark] = {
                "num_items": self.num_items,
                "greedy": sum(item["greedy_correct"] for item in mine) / self.num_items,
                "pass@1": sum(sum(item["samples_correct"]) for item in mine) / self.num_items / 8,
                "pass@k": {"4": 0.5},
                "nll": sum(item["nll"] for item in mine) / sum(item["nll_tokens"] for item in mine),
                "unparsed": 0,
            }
        results = {"format": "plain" if point == "base" else "chat", "benchmarks": scores, "mean": {}}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))

    def add_microscope(self, folder: Path, seed: int) -> None:
        rows: list[dict[str, Any]] = []
        labels = [("document", "prose"), ("document", f"add/steps{self.text}")]
        for kind, label in [*labels, *(("benchmark", name) for name in self.benchmarks)]:
            for index in range(2):
                tokens = ["3", f" plus{self.text}", " 4", " is", "\n", " 7", ""]
                delta = [self.random.gauss(0, 1) for _ in tokens]
                rows.append(
                    {
                        "kind": kind,
                        "label": label,
                        "id": f"line {index}{self.text}",
                        "num_tokens": 9,
                        "num_prompt": 3 if kind == "benchmark" else 0,
                        "tokens": tokens,
                        "logp_ref": [None, *(-1.0 + d for d in delta[1:])],
                        "logp_base": [None, *(-1.0 for _ in delta[1:])],
                        "delta": [None, *delta[1:]],
                        "weight": [None, *(min(1.8, max(0.2, 1 + d / 2)) for d in delta[1:])],
                    }
                )
        mean = {"count": 30 + seed, "weight": 1.3, "delta": 0.5}
        tables = {
            "weighting": "remit",
            "eps": 0.8,
            "num_documents": 4,
            "num_tokens": 24,
            "num_entries": 7,
            "min_count": 20,
            "mean_weight": 1.01,
            "mean_delta": 0.1,
            "lifted": [{"token": f" plus{self.text}", **mean}],
            "damped": [{"token": "7", **mean, "weight": 0.4, "delta": -1.2}],
            "sources": [{"source": label, **mean} for _, label in labels],
            "histogram": [0, 0, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 1, 2, 1, 1, 0, 0, 0, 0],
        }
        (folder / "microscope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "tokens.json").write_text(json.dumps(tables))

    def add_rollouts(self, folder: Path) -> None:
        rows = []
        for update, number in ((1, 0), (1, 1), (20, 0), (40, 0), (40, 1)):
            statuses = ["right", "wrong", "unparsed", f"odd{self.text}"]
            samples = [
                {"text": f"sample {i} {self.text}", "status": status, "advantage": 1.0 - i}
                for i, status in enumerate(statuses)
            ]
            prompt = f"prompt {number} of update {update} {self.text}"
            rows.append({"update": update, "prompt": prompt, "answer": f"7{self.text}", "samples": samples})
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def add_arm(self, seed: int, cycle: int, arm: str, effect: float, *, until: str = "grpo") -> None:
        prefix, done = f"s{seed}/c{cycle}/{arm}", True
        place = {"seed": seed, "cycle": cycle, "arm": arm}
        shared = {"data": f"s{seed}/data", "tokenizer": f"s{seed}/tokenizer"}
        previous, noise = f"s{seed}/pretrain", random.Random(f"{seed}/{arm}").gauss(0, 0.01)
        if cycle > 0:
            reference = f"s{seed}/c{cycle - 1}/{'ntp' if cycle == 1 else arm}/grpo"
            self.add(f"{prefix}/annotate", "annotate", {"reference": reference, **shared}, **place)
            inputs = {"base": previous, "reference": reference, "data": shared["data"]}
            self.add_microscope(self.add(f"{prefix}/microscope", "microscope", inputs, **place), seed)
        for number, step in enumerate(ARM_STEPS):
            inputs = {"base": previous, **shared}
            if step == "midtrain" and cycle > 0:
                inputs["annotations"] = f"{prefix}/annotate"
            if step == "dpo":
                inputs["base"], inputs["pairs"] = f"{prefix}/sft", f"{prefix}/pairs"
            folder = self.add(f"{prefix}/{step}", step, inputs, done=done, **place)
            if done and step != "pairs":
                self.add_metrics(folder, step, arm)
            if done and step == "grpo":
                self.add_rollouts(folder)
            previous = f"{prefix}/{step}"
            for point, measured in POINT_OF_LEAF.items():
                if measured == step:
                    eval_inputs = {"model": previous, "data": shared["data"]}
                    folder = self.add(f"{prefix}/eval_{point}", "eval", eval_inputs, done=done, **place)
                    if done:
                        self.add_evaluation(folder, point, 0.5 + 0.03 * number + effect + noise, seed)
            done = done and step != until

    def write(self, recipe: dict[str, Any], name: str) -> Path:
        run = {"name": name, "recipe": recipe, "versions": {"polm": "0.1.0", "torch": "2.13.0"}, "nodes": self.nodes}
        (self.run_dir / "run.json").write_text(json.dumps(run))
        recipe_text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items())
        (self.run_dir / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        return self.run_dir


def build_synthetic_run(
    run_dir: Path,
    *,
    seeds: int = 1,
    arms: tuple[tuple[str, float], ...] = (("remit", 0.05), ("rho1", 0.0)),
    cycles: int = 1,
    benchmarks: tuple[str, ...] = ("add", "sort"),
    num_items: int = 30,
    until: str = "grpo",
    text: str = "",
    name: str = "synthetic",
) -> Path:
    """Write a run folder; `until` is the last finished step of the arms other than the control."""
    run_dir.mkdir(parents=True, exist_ok=True)
    builder = RunBuilder(run_dir, list(benchmarks), num_items, text)
    for seed in range(seeds):
        place = {"seed": seed, "cycle": None, "arm": None}
        builder.add(f"s{seed}/data", "data", {}, **place)
        builder.add(f"s{seed}/tokenizer", "tokenizer", {"data": f"s{seed}/data"}, **place)
        folder = builder.add(
            f"s{seed}/pretrain", "pretrain", {"data": f"s{seed}/data", "tokenizer": f"s{seed}/tokenizer"}, **place
        )
        builder.add_metrics(folder, "pretrain", None)
        builder.add_arm(seed, 0, "ntp", 0.0)
        for cycle in range(1, cycles + 1):
            for arm, effect in arms:
                builder.add_arm(seed, cycle, arm, effect * cycle, until=until)
    return builder.write({"name": name, "note": text, "cycles": cycles}, name)


@pytest.fixture
def build_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a synthetic run folder under the test's own folder; see `build_synthetic_run` for the options."""

    def build(**options: Any) -> Path:
        return build_synthetic_run(tmp_path / "run", **options)

    return build


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds, two arms against the control, everything finished; shared by the tests that only read."""
    return build_synthetic_run(tmp_path_factory.mktemp("runs") / "small", seeds=2)


@pytest.fixture(scope="session")
def hostile() -> str:
    """A text that tries to leave its place by markup, quotes, direction marks and control characters."""
    return HOSTILE
