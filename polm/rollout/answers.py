"""A model's own answers to chat prompts: what every stage samples that learns from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.device import sample_in_bf16
from polm.models.loading import count_parameters
from polm.rollout.generate import Completion, Mixture, SamplingParams, generate
from polm.text.chat import stop_token_ids
from polm.tokens import Array


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Array],
    *,
    max_new_tokens: int,
    temperature: float,
    samples: int,
    seed: int,
    precision: str,
    top_p: float = 1.0,
    top_k: int = 0,
    progress: Callable[[int, int], None] | None = None,
    mixture: Mixture | None = None,
) -> list[Completion]:
    """`samples` answers to each rendered prompt (token ids), ordered by (prompt, sample); each ends with its turn."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_samples=samples,
        seed=seed,
        stop_token_ids=stop_token_ids(tokenizer),
    )
    bf16 = sample_in_bf16(precision, model.device.type, count_parameters(model))
    return generate(model, tokenizer, prompts, params, bf16=bf16, progress=progress, mixture=mixture)
