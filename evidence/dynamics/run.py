"""Where do base and RL model part? Their divergence along pre-training and annealing, by class of token.

python evidence/dynamics/run.py [SEED ...]    # goes on where it stopped; a seed with a file in seeds/ is not run again

The loops are deterministic, so they are walked a second time with a look at the model at chosen updates; that the
second walk ends in the same weights as the first is checked.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import PreTrainedModel

from polm.config import load_settings
from polm.data.examples import build_document_trees, encode_document
from polm.data.packing import PackedTrees
from polm.data.readers import read_weighted_documents
from polm.demo.corpus import build_benchmark
from polm.demo.prose import generate_prose
from polm.demo.tasks import TASKS
from polm.engine.device import set_threads
from polm.engine.fit import fit
from polm.engine.score import score_top_k
from polm.evals.claims import build_claim, write_claims
from polm.flywheel.graph import build_graph
from polm.flywheel.runner import Plan, build_plan, run_graph
from polm.models.loading import load_model
from polm.objectives.ntp import build_ntp
from polm.recipe import PackedSettings, Recipe
from polm.stages.common import Base, build_source, load_base, new_ledger
from polm.stages.pretrain import build_new_base
from polm.tokens import Step, TokenBatch, build_document, collate

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs"
NUM_ITEMS, NUM_PROSE = 20, 60
OPERATORS = {"+", "-", "*", "/", "=", "<", ">", ",", ";", ":", "."}
MARKS = {"steps", "####"}
CLASSES = ("numbers", "operators", "connectives", "marks", "questions", "filler")
PRETRAIN_LOOKS = (20, 50, 100, 200, 300, 450, 600, 750, 900)
MIDTRAIN_LOOKS = (0, 15, 30, 50, 75, 100, 125, 150)


@dataclass(frozen=True)
class Probe:
    """Held-out solutions and prose as one batch; `classes_N` is the class of each target."""

    batch: TokenBatch
    classes_N: np.ndarray[Any, Any]


@dataclass
class Watched:
    """A batch source that looks at the model before chosen updates; the batches are those of `source`."""

    source: PackedTrees
    probe: Probe
    looks: Sequence[int]
    seen: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def num_updates(self) -> int:
        return self.source.num_updates

    def resumable(self, update: int) -> bool:
        return self.source.resumable(update)

    def step(self, update: int, model: PreTrainedModel) -> Step:
        if update in self.looks:
            self.look(update, model)
        return self.source.step(update, model)

    def look(self, update: int, model: PreTrainedModel) -> None:
        self.seen[update] = compute_all_logprobs(model, self.probe)
        model.train()


def compute_all_logprobs(model: PreTrainedModel, probe: Probe) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary at each target, in the order of token ids, [N, V] float32."""
    model.eval()
    _, ids_NV, values_NV = score_top_k(model, probe.batch, 1 << 30)
    return torch.empty_like(values_NV).scatter_(1, ids_NV, values_NV)


def classify(word: str, in_question: bool) -> str:
    """The class of a token of a solution (or of its question)."""
    if in_question:
        return "questions"
    if word.isdigit():
        return "numbers"
    if word in OPERATORS:
        return "operators"
    return "marks" if word in MARKS or word.startswith("<|") else "connectives"


def build_probe(base: Base) -> Probe:
    """Benchmark items with their solutions, and fresh prose whose every token is filler."""
    tokenizer, trees, classes = base.tokenizer, [], []
    texts = [(item.prompt, item.solution) for task in TASKS for item in build_benchmark(task, NUM_ITEMS)]
    rng = Random("dynamics/prose")
    texts += [("", generate_prose(rng)) for _ in range(NUM_PROSE)]
    for prompt, rest in texts:
        ids = encode_document(tokenizer, f"{prompt} {rest}".strip())
        words = tokenizer.convert_ids_to_tokens(ids.tolist())
        num_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else 0
        trees.append(build_document(ids))
        classes += [
            classify(word, place < num_prompt) if prompt else "filler" for place, word in enumerate(words) if place > 0
        ]
    return Probe(collate(trees), np.array(classes))


def compute_divergence(reference_NV: torch.Tensor, model_NV: torch.Tensor, probe: Probe) -> dict[str, float]:
    """Mean KL(reference || model) in nats by class of token."""
    kl_N = (reference_NV.exp() * (reference_NV - model_NV)).sum(-1).numpy()
    return {name: float(kl_N[probe.classes_N == name].mean()) for name in CLASSES}


def walk(
    base: Base, data: Path, settings: PackedSettings, looks: Sequence[int], probe: Probe
) -> dict[int, torch.Tensor]:
    """Train `base` as the stage does, with a look at each of `looks`; returns what was seen."""
    ledger = new_ledger()
    limit = min(settings.bin_tokens, base.max_positions)
    documents = read_weighted_documents(data)
    trees = build_document_trees(base.tokenizer, documents, context=limit, too_long=settings.too_long, ledger=ledger)
    watched = Watched(build_source(trees, settings, ledger), probe, looks)
    with tempfile.TemporaryDirectory() as folder:
        fit(base.model, watched, build_ntp(), settings, Path(folder))
    watched.look(watched.num_updates, base.model)
    return watched.seen


def require_same_weights(model: PreTrainedModel, folder: Path) -> None:
    """The second walk must end where the first did."""
    first = load_model(folder / "model").state_dict()
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items()), folder


def run_seed(plan: Plan, seed: int) -> dict[str, Any]:
    """Divergence from the RL model by place on the road and class of token."""
    graph, data = plan.graph, plan.folder(f"s{seed}/data")
    pretrain, midtrain = graph[f"s{seed}/pretrain"].settings, graph[f"s{seed}/c0/ntp/midtrain"].settings
    assert isinstance(pretrain, PackedSettings)
    assert isinstance(midtrain, PackedSettings)
    set_threads(pretrain.threads)
    base = build_new_base(pretrain, str(plan.folder(f"s{seed}/tokenizer")))  # type: ignore[arg-type]
    probe = build_probe(base)
    reference = load_base(str(plan.folder(f"s{seed}/c0/ntp/grpo")))
    reference_NV = compute_all_logprobs(reference.model, probe)
    looks = [u for u in PRETRAIN_LOOKS if u < (pretrain.updates or 0)]
    early = walk(base, data / "pretrain.jsonl", pretrain, looks, probe)
    require_same_weights(base.model, plan.folder(f"s{seed}/pretrain"))
    later = [u for u in MIDTRAIN_LOOKS if u < (midtrain.updates or 0)]
    late = walk(base, data / "midtrain.jsonl", midtrain, later, probe)
    require_same_weights(base.model, plan.folder(f"s{seed}/c0/ntp/midtrain"))
    rows = [("pretrain", u, compute_divergence(reference_NV, seen, probe)) for u, seen in early.items()]
    rows += [("midtrain", u, compute_divergence(reference_NV, seen, probe)) for u, seen in late.items()]
    counts = {name: int((probe.classes_N == name).sum()) for name in CLASSES}
    divergence = [{"phase": phase, "update": u, **values} for phase, u, values in rows]
    return {"seed": seed, "targets": counts, "divergence": divergence, "cores": os.cpu_count()}


def build_claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Does annealing bring the base nearer to the RL model, and faster than the same updates before it did?"""
    claims = []
    for name in CLASSES:
        whole, rates = [], []
        for row in rows:
            early = [d for d in row["divergence"] if d["phase"] == "pretrain"]
            late = [d for d in row["divergence"] if d["phase"] == "midtrain"]
            gained = late[-1][name] - late[0][name]
            updates = late[-1]["update"] - late[0]["update"]
            before = (early[-1][name] - early[-2][name]) / (early[-1]["update"] - early[-2]["update"]) * updates
            whole.append(gained)
            rates.append(gained - before)
        claims.append(
            build_claim(
                f"annealing lowers the divergence from the RL model on {name}",
                metric=f"KL(RL || base), {name} (nats a token)",
                arm="after annealing",
                control="before annealing",
                differences=whole,
                better="lower",
            )
        )
        claims.append(
            build_claim(
                f"annealing lowers it on {name} by more than as many updates at the end of pre-training",
                metric=f"change of KL(RL || base), {name} (nats a token)",
                arm="annealing",
                control="end of pre-training, scaled to as many updates",
                differences=rates,
                better="lower",
            )
        )
    return claims


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Divergence by class along both phases: thin lines are seeds, thick ones their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, phase in zip(axes, ("pretrain", "midtrain"), strict=True):
        for i, name in enumerate(CLASSES):
            values: dict[int, list[float]] = defaultdict(list)
            for row in rows:
                for one in row["divergence"]:
                    if one["phase"] == phase:
                        values[one["update"]].append(one[name])
            places = sorted(values)
            axis.plot(places, [np.mean(values[u]) for u in places], marker="osD^vP"[i], color=f"C{i}", label=name)
            for seed in range(len(rows)):
                axis.plot(places, [values[u][seed] for u in places], color=f"C{i}", alpha=0.35, lw=0.8)
        axis.set_title("pre-training" if phase == "pretrain" else "annealing")
        axis.set_xlabel("updates")
        axis.set_yscale("log")
    axes[0].set_ylabel("KL(RL model || base), nats a token")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    recipe = load_settings(Recipe, HERE / "recipe.yaml", [f"seeds=[{','.join(sys.argv[1:])}]"] if sys.argv[1:] else [])
    missing = [seed for seed in recipe.seeds if not (HERE / "seeds" / f"{seed}.json").is_file()]
    if missing:
        recipe = load_settings(Recipe, HERE / "recipe.yaml", [f"seeds={missing}"])
        graph = {n: node for n, node in build_graph(recipe).items() if node.stage != "eval"}
        plan = build_plan(recipe, graph, RUNS / recipe.name)
        run_graph(plan, workers=os.cpu_count() or 1, watch=lambda event: print(event.kind, event.node.id, flush=True))
        for seed in missing:
            path = HERE / "seeds" / f"{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(run_seed(plan, seed), indent=1) + "\n")
    rows = [json.loads(path.read_text()) for path in sorted((HERE / "seeds").glob("*.json"))]
    if len(rows) > 1:
        claims = build_claims(rows)
        write_claims(HERE / "result.json", claims)
        for claim in claims:
            verdict = "shown" if claim["holds"] else "not shown"
            print(f"{claim['mean']:+.4f} ± {claim['stderr']:.4f}  {verdict}  {claim['claim']}")
        draw(rows, HERE / "figure.png")


if __name__ == "__main__":
    main()
