"""Log-probabilities of the targets of a batch, in chunks: full logits [T, V] never exist.

Shape suffixes: N targets, D width, V vocabulary, K token ids scored per target (the target first).
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.engine.head import HeadSettings, compute_chunk_logits, compute_head, split_rows
from polm.errors import ModelError
from polm.models.actor_critic import ActorCritic, Trained
from polm.models.forest_attention import round_rows
from polm.models.heads import compute_values, find_scalar_head
from polm.models.loading import compute_hidden, output_head
from polm.signals.noise import draw_embedding_noise
from polm.tokens import Needs, Objective, Scores, TokenBatch


def autocast(device: str, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 compute over fp32 masters, or nothing."""
    return torch.autocast(device, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def score(
    model: Trained,
    batch: TokenBatch,
    needs: Needs | None = None,
    *,
    temperature: float = 1.0,
    bf16: bool = False,
    slopes_NK: Tensor | None = None,
) -> Scores:
    """Score every target of `batch` (on the model's device) under `model`.

    `temperature` divides the logits, so that a tempered policy is trained as it was sampled. `needs.embedding_noise`
    is drawn from the batch's seed; only the training loop asks for it, by its objective. With bf16 the products run in
    bfloat16 and the log-softmax in float32. Gradients flow to the model when they are enabled; where `slopes_NK` (of
    `find_slopes`) says what the log-probabilities will get, the head's is computed in its forward pass.

    A scalar model gives values (`needs.values`) and nothing else, a policy with its critic both; ModelError where an
    objective and a model do not fit.
    """
    needs = needs or Needs()
    if isinstance(model, ActorCritic):
        scores = score(model.policy, batch, replace(needs, values=False), temperature=temperature, bf16=bf16)
        values = score(model.critic, batch, Needs(values=True), bf16=bf16) if needs.values else None
        return scores if values is None else replace(scores, values_TL=values.values_TL)
    device = batch.tokens_T.device.type
    _require_fit(model, needs)
    noise_TD = None
    if needs.embedding_noise:
        noise_TD = draw_embedding_noise(batch, int(model.get_input_embeddings().weight.shape[1]), needs.embedding_noise)
    with autocast(device, bf16):
        hidden_TD = compute_hidden(model, batch, round_up=bf16, noise_TD=noise_TD)
    if needs.values:
        return Scores(hidden_TD.new_zeros(0), values_TL=compute_values(model, hidden_TD))
    ids_NK = batch.target_tokens_N[:, None]
    if needs.candidates is not None:
        ids_NK = torch.cat([ids_NK, batch.at_targets(needs.candidates)], dim=1)
    num_targets = len(ids_NK)
    spare = round_rows(num_targets) - num_targets if bf16 else 0
    hidden_ND = hidden_TD.index_select(0, torch.nn.functional.pad(batch.target_predictors_N, (0, spare)))
    ids_NK = torch.nn.functional.pad(ids_NK, (0, 0, 0, spare))
    weight, cap = output_head(model)
    settings = HeadSettings(temperature, cap, torch.bfloat16 if bf16 else weight.dtype)
    if slopes_NK is not None:
        slopes_NK = torch.nn.functional.pad(slopes_NK, (0, 0, 0, spare))
    logprobs_NK, entropy_N = compute_head(
        hidden_ND, weight, ids_NK, settings, with_entropy=needs.entropy, slopes_NK=slopes_NK
    )
    return Scores(
        logprobs_N=logprobs_NK[:num_targets, 0],
        entropy_N=entropy_N[:num_targets] if needs.entropy else None,
        candidates_NK=logprobs_NK[:num_targets, 1:] if needs.candidates is not None else None,
        collisions_N=_score_collisions(hidden_ND[:num_targets], weight, temperature, cap) if needs.collisions else None,
    )


def find_slopes(objective: Objective, batch: TokenBatch) -> Tensor | None:
    """The gradient that a linear objective's total puts on the log-probabilities, [N, K] float32, the target's first;
    None for an objective that is not linear in them. Found by differentiating the objective itself at zero."""
    if not objective.linear:
        return None
    num_candidates = 0 if objective.needs.candidates is None else batch.streams[objective.needs.candidates].shape[1]
    shape, device = (batch.num_targets, 1 + num_candidates), batch.tokens_T.device
    at_NK = torch.zeros(shape, dtype=torch.float32, device=device, requires_grad=True)
    candidates_NK = at_NK[:, 1:] if num_candidates else None
    total = objective.compute(Scores(at_NK[:, 0], candidates_NK=candidates_NK), batch).total
    (slopes_NK,) = torch.autograd.grad(total, at_NK)
    return slopes_NK


def _require_fit(model: PreTrainedModel, needs: Needs) -> None:
    """A model has a vocabulary or values; an objective reads the one or the other."""
    is_scalar = find_scalar_head(model) is not None
    if is_scalar and not needs.values:
        raise ModelError(
            f"this {model.config.model_type} model gives values and no log-probabilities (it is a reward model or a "
            "critic); give a causal language model"
        )
    if needs.values and needs != Needs(values=True):
        raise ModelError(f"values come from a model without a vocabulary; {needs} cannot be had from one model")


@torch.no_grad()
def score_top_k(
    model: PreTrainedModel, batch: TokenBatch, top_k: int, *, bf16: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass for the target and the `top_k` likeliest next tokens at each place.

    Returns (log-probabilities of the targets [N], ids [N, K] int64, log-probabilities [N, K]), float32.
    """
    with autocast(batch.tokens_T.device.type, bf16):
        hidden_TD = compute_hidden(model, batch, round_up=bf16)
    hidden_ND = hidden_TD.index_select(0, batch.target_predictors_N)
    weight, cap = output_head(model)
    logprobs, ids, values = [], [], []
    for part in split_rows(len(hidden_ND), weight.shape[0]):
        logits = compute_chunk_logits(hidden_ND[part], weight.to(hidden_ND.dtype), 1.0, cap)
        logp = torch.log_softmax(logits, dim=-1)
        top = logp.topk(min(top_k, logits.shape[-1]), dim=-1)
        logprobs.append(logp.gather(1, batch.target_tokens_N[part, None])[:, 0])
        ids.append(top.indices)
        values.append(top.values)
    return torch.cat(logprobs), torch.cat(ids), torch.cat(values)


@torch.no_grad()
def _score_collisions(hidden_ND: Tensor, weight_VD: Tensor, temperature: float, cap: float | None) -> Tensor:
    """log of the sum of p^2 over the vocabulary at each target, [N] float32: one more pass of the head, no gradient."""
    weight = weight_VD.to(hidden_ND.dtype)
    parts = [
        torch.logsumexp(
            2.0 * torch.log_softmax(compute_chunk_logits(hidden_ND[part], weight, temperature, cap), -1), -1
        )
        for part in split_rows(len(hidden_ND), weight.shape[0])
    ]
    return torch.cat(parts)
