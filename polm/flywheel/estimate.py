"""The arithmetic of a run before it starts: updates, tokens, prompts x samples, floating-point operations, memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polm.flywheel.graph import Graph, Node
from polm.flywheel.kinds import AnyRecipe
from polm.recipe import (
    AnnotateSettings,
    DPOSettings,
    EvalSettings,
    GRPOSettings,
    MicroscopeSettings,
    ModelShape,
    PackedSettings,
    PairsSettings,
    Recipe,
)
from polm.recipe_judge import JudgeStage

BYTES_PER_TRAINED_PARAMETER = 16  # float32 weight, gradient and two moments
# Measured on the demo with a CPU build: torch and transformers loaded; what a worker keeps of compiled products and
# freed memory; and what sampling adds to a training process.
PROCESS_BYTES = 450e6
KEPT_BYTES = 150e6
SAMPLING_BYTES = 250e6
LIVE_BYTES_PER_TOKEN_AND_UNIT = 34  # activations kept for the backward pass, per token, layer and hidden unit


@dataclass(frozen=True)
class Estimate:
    """What a node will do; None where it depends on the length of the data."""

    updates: int | None = None
    tokens: int | None = None
    samples: int | None = None
    memory_bytes: float | None = None


def count_shape_parameters(shape: ModelShape, vocab_size: int) -> int:
    """Parameters of a Llama-like decoder: embeddings, attention, gated MLP, norms left out."""
    head = shape.hidden_size // shape.num_heads
    attention = shape.hidden_size * head * (2 * shape.num_heads + 2 * shape.num_key_value_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    tables = vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    return shape.num_layers * layer + tables


def estimate_node(node: Node, recipe: AnyRecipe) -> Estimate:
    """The arithmetic of one node. `vocab_size` is taken at its limit; a base from outside has an unknown size."""
    settings = node.settings
    shape, parameters = ModelShape(), None
    if isinstance(recipe, Recipe):
        shape = recipe.pretrain.model
        parameters = count_shape_parameters(shape, recipe.tokenizer.vocab_size) if recipe.base is None else None
    if isinstance(settings, GRPOSettings):
        rollouts = (settings.updates or 0) / settings.updates_per_rollout
        samples = round(rollouts * settings.prompts_per_rollout * settings.samples) if settings.updates else None
        live = _training_bytes(parameters, shape, settings.bin_tokens)
        if live is not None and parameters is not None:
            has_second = settings.kl_groups > 0 or settings.kl_beta > 0  # the model that KL is measured to
            live += SAMPLING_BYTES + (4.0 * parameters if has_second else 0.0)
        return Estimate(settings.updates, None, samples, live)
    if isinstance(settings, PackedSettings):
        per_update = settings.bin_tokens * settings.bins_per_update
        tokens = settings.updates * per_update if settings.updates else None
        micro = settings.bin_tokens * (settings.micro_bins or settings.bins_per_update)
        live = _training_bytes(parameters, shape, micro)
        if isinstance(settings, DPOSettings) and live is not None and parameters is not None:
            live += 4 * parameters
        return Estimate(settings.updates, tokens, None, live)
    if isinstance(settings, EvalSettings):
        items = settings.num_items * len(settings.benchmarks) if settings.benchmarks and settings.num_items else None
        return Estimate(samples=items * (1 + settings.samples) if items else None, memory_bytes=_held(parameters))
    if isinstance(settings, PairsSettings):
        return Estimate(samples=settings.num_prompts * settings.samples, memory_bytes=_held(parameters))
    if isinstance(settings, JudgeStage):
        return Estimate(samples=settings.num_prompts * settings.samples or None, memory_bytes=_held(parameters))
    if isinstance(settings, AnnotateSettings):
        return Estimate(memory_bytes=_held(parameters))
    if isinstance(settings, MicroscopeSettings):  # one model after the other
        return Estimate(memory_bytes=_held(parameters))
    return Estimate()


def _training_bytes(parameters: int | None, shape: ModelShape, tokens: int) -> float | None:
    if parameters is None:
        return None
    live = LIVE_BYTES_PER_TOKEN_AND_UNIT * tokens * shape.num_layers * shape.hidden_size
    return PROCESS_BYTES + KEPT_BYTES + BYTES_PER_TRAINED_PARAMETER * parameters + live


def _held(parameters: int | None) -> float | None:
    return None if parameters is None else PROCESS_BYTES + KEPT_BYTES + 4.0 * parameters


def estimate_peak(graph: Graph, recipe: AnyRecipe, workers: int) -> float | None:
    """Bytes when the `workers` largest nodes run at once, with the parent beside them."""
    sizes = [estimate_node(node, recipe).memory_bytes for node in graph.values()]
    known = sorted((size for size in sizes if size is not None), reverse=True)
    return PROCESS_BYTES + sum(known[:workers]) if known else None


def sum_known(values: Iterable[int | None]) -> int:
    """The sum of what is known."""
    return sum(value for value in values if value is not None)
