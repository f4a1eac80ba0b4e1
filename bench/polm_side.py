"""polm's side of each comparison: the engine as the stages call it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.channel import Channel, Meter, measure_calls
from bench.flops import decode_pairs, read_cost
from bench.setup import (
    CONTEXT,
    EQUAL_LENGTH,
    NEW_TOKENS,
    NUM_PROMPTS,
    NUM_QUESTIONS,
    NUM_SAMPLES,
    SHAPES,
    Spec,
    answer_lengths,
    documents,
    instructions,
    model_folder,
    preferences,
    questions,
)
from polm.data.packing import pack_best_fit, pack_trees
from polm.data.tree_store import AttachedTrees
from polm.engine.annotate import annotate_trees
from polm.engine.device import pick_device, use_bf16
from polm.engine.fit import BatchSource, fit
from polm.engine.score import score
from polm.models.halved import halve_matrices
from polm.models.loading import load_model, load_tokenizer
from polm.objectives.ntp import build_ntp
from polm.objectives.policy_gradient import build_policy_gradient
from polm.objectives.preference import Knobs, build_preference
from polm.objectives.remit import build_remit
from polm.recipe import OptimizerSettings, TrainSettings
from polm.rollout.generate import SamplingParams, generate
from polm.signals.advantages import compute_group_advantages
from polm.tokens import Objective, Step, Tree, build_completions, build_document, collate, tree_length


def load(spec: Spec, kind: str = "model") -> Any:
    return load_model(model_folder(spec.model, kind), device=pick_device())


def build_settings(spec: Spec) -> TrainSettings:
    return TrainSettings(
        seed=spec.seed,
        updates=10**6,
        bin_tokens=CONTEXT,
        precision=spec.precision,  # type: ignore[arg-type]
        threads=spec.threads,
        optimizer=OptimizerSettings(learning_rate=2e-5, beta2=0.999),
    )


@dataclass
class Watched:
    """A batch source that remembers what each update needed, until it is reported."""

    inner: BatchSource
    count: Callable[[Step], dict[str, float]]
    needed: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def reads_weights(self) -> bool:
        return self.inner.reads_weights

    @property
    def num_updates(self) -> int:
        return self.inner.num_updates

    def resumable(self, update: int) -> bool:
        return self.inner.resumable(update)

    def step(self, update: int, model: Any) -> Step:
        step = self.inner.step(update, model)
        self.needed[update] = self.count(step)
        return step


def train(
    channel: Channel,
    spec: Spec,
    model: Any,
    source: BatchSource,
    objective: Objective,
    count: Callable[[Step], dict[str, float]],
    guard: float | None,
    warmup: int = 2,
) -> None:
    """Run the loop; each update is a tick."""
    meter = Meter(channel, spec.seconds, warmup, guard)
    watched = Watched(source, count)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            watched,
            objective,
            build_settings(spec),
            Path(folder),
            report=lambda line: meter.tick(**watched.needed.pop(line["update"] - 1)),
        )


def compute_guard(spec: Spec, model: Any, trees: Sequence[Tree], objective: Objective) -> float:
    """The loss of a few examples under the starting weights; the peer's must be the same."""
    batch = collate(trees).to(model.device)
    with torch.no_grad():
        out = objective.compute(score(model, batch, objective.needs, bf16=is_bf16(spec)), batch)
    return float(out.total / out.denominator)


def is_bf16(spec: Spec) -> bool:
    return use_bf16(spec.precision, pick_device())


def pack(trees: Sequence[Tree], spec: Spec) -> Any:
    return pack_trees(
        trees, bin_tokens=CONTEXT, bins_per_update=1, micro_bins=0, updates=10**6, epochs=None, seed=spec.seed
    )


def run_sft(channel: Channel, spec: Spec) -> None:
    model = load(spec)
    cost = read_cost(model)
    rows = instructions(SHAPES[spec.model]["vocab_size"], 2000, spec.seed)
    trees = [build_completions(prompt, [answer]) for prompt, answer in rows]

    def count(step: Step) -> dict[str, float]:
        return {
            "units": sum(b.num_tokens for b in step.batches),
            "flops": sum(cost.of_batch(b, training=True) for b in step.batches),
        }

    guard = compute_guard(spec, model, trees[:4], build_ntp())
    train(channel, spec, model, pack(trees, spec), build_ntp(), count, guard)


def run_dpo(channel: Channel, spec: Spec) -> None:
    model = load(spec)
    cost = read_cost(model)
    rows = preferences(SHAPES[spec.model]["vocab_size"], 400, spec.seed)
    marks = [{"sign": 1.0}, {"sign": -1.0}]
    trees: list[Tree] = [build_completions(prompt, [good, bad], marks=marks) for prompt, good, bad in rows]
    scores = annotate_trees(load(spec, "reference"), trees, bin_tokens=CONTEXT, bf16=is_bf16(spec))
    trees = AttachedTrees(trees, {"ref_logprobs": scores.logprobs})
    objective = build_preference("sigmoid", Knobs(beta=0.1))

    def count(step: Step) -> dict[str, float]:
        return {
            "units": sum(len(set(b.trees_S.tolist())) for b in step.batches),
            "flops": sum(cost.of_batch(b, training=True) for b in step.batches),
        }

    guard = compute_guard(spec, model, trees[:4], objective)
    train(channel, spec, model, pack(trees, spec), objective, count, guard)


@dataclass
class LiveReference:
    """A source whose batches are scored by the reference in the update that trains on them."""

    inner: BatchSource
    reference: Any
    bf16: bool
    num_updates: int = 10**6
    reads_weights: bool = True  # it asks the device for numbers

    def resumable(self, update: int) -> bool:
        return self.inner.resumable(update)

    @torch.no_grad()
    def step(self, update: int, model: Any) -> Step:
        batches = []
        for batch in self.inner.step(update, model).batches:
            stream = torch.zeros(batch.num_tokens)
            stream[batch.targets_N] = score(self.reference, batch.to(model.device), bf16=self.bf16).logprobs_N.cpu()
            batches.append(batch.with_streams(ref_logprobs=stream))
        return Step(batches)


def run_midtrain(channel: Channel, spec: Spec) -> None:
    """Sides: `polm` (ReMiT, reference scored beforehand), `live` (scored in each update), `ntp`."""
    model = load(spec)
    cost = read_cost(model)
    texts = documents(SHAPES[spec.model]["vocab_size"], 400, spec.seed)
    trees: list[Tree] = [build_document(ids) for ids in texts]
    objective = build_ntp()
    if spec.side != "ntp":
        objective = build_remit(
            eps=0.2, temperature=1.0, centring="sequence", base="live", denominator="tokens", shuffled=False
        )
    if spec.side == "polm":
        scores = annotate_trees(load(spec, "reference"), trees, bin_tokens=CONTEXT, bf16=is_bf16(spec))
        trees = AttachedTrees(trees, {"ref_logprobs": scores.logprobs})
    source: Any = pack(trees, spec)
    if spec.side == "live":
        source = LiveReference(source, load(spec, "reference").eval(), is_bf16(spec))

    def count(step: Step) -> dict[str, float]:
        return {
            "units": sum(b.num_tokens for b in step.batches),
            "flops": sum(cost.of_batch(b, training=True) for b in step.batches),
        }

    train(channel, spec, model, source, objective, count, None)


def run_scoring(channel: Channel, spec: Spec) -> None:
    """Log-probabilities of documents under a frozen model."""
    model = load(spec)
    cost = read_cost(model)
    texts = documents(SHAPES[spec.model]["vocab_size"], 64, spec.seed)
    trees = [build_document(ids) for ids in texts]
    flops = sum(cost.of_batch(collate([tree]), training=False) for tree in trees)
    tokens = sum(map(tree_length, trees))
    first = annotate_trees(model, trees[:4], bin_tokens=CONTEXT, bf16=is_bf16(spec)).logprobs
    guard = float(first.sum(dtype=np.float64) / (sum(map(tree_length, trees[:4])) - 4))

    def call() -> dict[str, float]:
        annotate_trees(model, trees, bin_tokens=CONTEXT, bf16=is_bf16(spec))
        return {"units": tokens, "flops": flops}

    measure_calls(channel, call, guard)


@dataclass
class Rollouts:
    """Sampling, advantages at random, packing: what the source of the GRPO stage does, without a verifier."""

    spec: Spec
    tokenizer: Any
    prompts: Sequence[np.ndarray]
    seconds: float = 0.0
    num_updates: int = 10**6
    reads_weights: bool = True

    def resumable(self, update: int) -> bool:
        del update
        return True

    def step(self, update: int, model: Any) -> Step:
        began = time.perf_counter()
        chosen = [self.prompts[(update * NUM_PROMPTS + i) % len(self.prompts)] for i in range(NUM_PROMPTS)]
        params = SamplingParams(max_new_tokens=NEW_TOKENS, num_samples=NUM_SAMPLES, seed=update, ignore_eos=True)
        completions = generate(model, self.tokenizer, chosen, params, bf16=is_bf16(self.spec))
        self.seconds = time.perf_counter() - began
        rewards = torch.from_numpy(np.random.default_rng(update).integers(0, 2, len(completions)).astype(np.float32))
        groups = torch.tensor([c.prompt_index for c in completions])
        advantages = compute_group_advantages(rewards, groups, scale="std").numpy()
        trees = []
        for group, prompt in enumerate(chosen):
            mine = [(c, a) for c, a in zip(completions, advantages, strict=True) if c.prompt_index == group]
            streams = [
                {"advantages": np.full(len(c.tokens), a, dtype=np.float32), "sampler_logprobs": c.logprobs}
                for c, a in mine
            ]
            trees.append(build_completions(prompt, [c.tokens for c, _ in mine], streams))
        lengths = [tree_length(tree) for tree in trees]
        bins = pack_best_fit(lengths, max(CONTEXT, *lengths), range(len(trees)))
        return Step([collate(trees[i] for i in part) for part in bins])


def run_grpo(channel: Channel, spec: Spec) -> None:
    """A unit is a step of 8 prompts x 8 completions of 64 tokens; `generation` is the sampler's part of the time."""
    model = load(spec)
    cost = read_cost(model)
    prompts = questions(SHAPES[spec.model]["vocab_size"], 128, spec.seed)
    objective = build_policy_gradient(
        clip_low=0.2,
        clip_high=0.2,
        kl_beta=0.0,
        normalize="tokens",
        max_completion_tokens=NEW_TOKENS,
        log_entropy=True,
    )
    source = Rollouts(spec, load_tokenizer(model_folder(spec.model)), prompts)

    def count(step: Step) -> dict[str, float]:
        flops = 0.0
        for batch in step.batches:
            flops += cost.of_batch(batch, training=True)
            for tree in range(int(batch.trees_S.max()) + 1):
                prompt = int(batch.lengths_S[(batch.trees_S == tree) & (batch.parents_S < 0)])
                fed = NUM_SAMPLES * (NEW_TOKENS - 1)
                pairs = NUM_SAMPLES * (decode_pairs(prompt, NEW_TOKENS) - decode_pairs(prompt, 1))
                flops += cost.forward(prompt + fed, decode_pairs(prompt, 1) + pairs, NUM_SAMPLES * NEW_TOKENS)
        return {"units": 1, "flops": flops, "generation": source.seconds}

    tree = build_completions(prompts[0], [prompts[1]])
    train(channel, spec, model, source, objective, count, compute_guard(spec, model, [tree], build_ntp()), warmup=1)


def run_generation(channel: Channel, spec: Spec, *, varying: bool) -> None:
    model = load(spec)
    cost = read_cost(model)
    tokenizer = load_tokenizer(model_folder(spec.model))
    prompts = questions(SHAPES[spec.model]["vocab_size"], NUM_QUESTIONS, spec.seed)
    lengths = answer_lengths(len(prompts), spec.seed) if varying else [EQUAL_LENGTH] * len(prompts)
    flops = sum(cost.forward(len(p) + n - 1, decode_pairs(len(p), n), n) for p, n in zip(prompts, lengths, strict=True))
    greedy = generate(model, tokenizer, prompts[:4], SamplingParams(8, temperature=0.0, ignore_eos=True))
    guard = float(sum((i + 1) * int(t) for c in greedy for i, t in enumerate(c.tokens[:4])))
    params = SamplingParams(max(lengths), seed=spec.seed, ignore_eos=True)
    if is_bf16(spec):
        halve_matrices(model)

    def call() -> dict[str, float]:
        out = generate(model, tokenizer, prompts, params, bf16=is_bf16(spec), limits=lengths)
        assert [len(c.tokens) for c in out] == lengths
        return {"units": sum(lengths), "flops": flops}

    measure_calls(channel, call, guard, warmup=0)


RUNS: dict[str, Callable[[Channel, Spec], None]] = {
    "sft": run_sft,
    "dpo": run_dpo,
    "midtrain": run_midtrain,
    "scoring": run_scoring,
    "grpo": run_grpo,
    "generation-equal": lambda channel, spec: run_generation(channel, spec, varying=False),
    "generation-varying": lambda channel, spec: run_generation(channel, spec, varying=True),
}
