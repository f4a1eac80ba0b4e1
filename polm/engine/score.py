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

from polm.errors import ModelError
from polm.models.actor_critic import ActorCritic, Trained
from polm.models.forest_attention import round_rows
from polm.models.heads import compute_values, find_scalar_head
from polm.models.kernels.build import load_library
from polm.models.kernels.rows import head_backward_, head_forward
from polm.models.loading import compute_hidden, output_head
from polm.signals.noise import draw_embedding_noise
from polm.tokens import Needs, Scores, TokenBatch

MAX_LOGITS = 1 << 23  # logits of one chunk: 32 MB in float32
KEPT_LOGITS = 1 << 25  # log-probabilities kept for the backward pass; those of chunks beyond it are computed again
KEPT_BYTES = 4 * KEPT_LOGITS  # of logits that the compiled head keeps


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
) -> Scores:
    """Score every target of `batch` (on the model's device) under `model`.

    `temperature` divides the logits, so that a tempered policy is trained as it was sampled. `needs.embedding_noise`
    is drawn from the batch's seed; only the training loop asks for it, by its objective. Gradients flow to the model
    when they are enabled. With bf16 the products run in bfloat16 and the log-softmax in float32.

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
    compute_dtype = torch.bfloat16 if bf16 else weight.dtype
    # A soft cap has a slope of its own, which the compiled head does not know.
    compiled = bf16 and cap is None and device == "cpu" and load_library() is not None
    head = _CompiledHead if compiled else _ChunkedHead
    logprobs_NK, entropy_N = head.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight, ids_NK, temperature, cap, needs.entropy, compute_dtype, torch.is_grad_enabled()
    )
    return Scores(
        logprobs_N=logprobs_NK[:num_targets, 0],
        entropy_N=entropy_N[:num_targets] if needs.entropy else None,
        candidates_NK=logprobs_NK[:num_targets, 1:] if needs.candidates is not None else None,
        collisions_N=_score_collisions(hidden_ND[:num_targets], weight, temperature, cap) if needs.collisions else None,
    )


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
    for part in _chunks(len(hidden_ND), weight.shape[0]):
        logits = _chunk_logits(hidden_ND[part], weight.to(hidden_ND.dtype), 1.0, cap)
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
        torch.logsumexp(2.0 * torch.log_softmax(_chunk_logits(hidden_ND[part], weight, temperature, cap), -1), -1)
        for part in _chunks(len(hidden_ND), weight.shape[0])
    ]
    return torch.cat(parts)


def _chunks(num_rows: int, vocab: int) -> list[slice]:
    rows = max(1, MAX_LOGITS // vocab)
    return [slice(a, min(a + rows, num_rows)) for a in range(0, num_rows, rows)] or [slice(0, 0)]


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: float, cap: float | None) -> Tensor:
    """Float32 logits of one chunk, capped and tempered."""
    logits = torch.matmul(hidden, weight.t()).float()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.div_(temperature) if temperature != 1.0 else logits


class _ChunkedHead(torch.autograd.Function):
    """(hidden, output matrix, ids) -> log-probabilities of ids and entropy.

    The backward pass takes the whole distributions that the forward pass kept, up to KEPT_LOGITS numbers, and computes
    the others again. With p the predicted distribution, g_k the gradient of logprob k and h that of the entropy H:
    d loss / d logit_v = sum_k g_k (1[v = id_k] - p_v) - h p_v (log p_v + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_NK: Tensor,
        temperature: float,
        cap: float | None,
        with_entropy: bool,
        dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        weight = weight_VD.to(dtype)
        logprobs = torch.empty(ids_NK.shape, dtype=torch.float32, device=hidden_ND.device)
        entropy = torch.zeros(ids_NK.shape[0] if with_entropy else 0, dtype=torch.float32, device=hidden_ND.device)
        kept: dict[int, Tensor] = {}  # first row of a chunk -> log-probabilities [rows, V]
        # The slope of the cap needs the logits themselves.
        room = KEPT_LOGITS if keep and cap is None else 0
        for part in _chunks(len(hidden_ND), weight.shape[0]):
            logp = torch.log_softmax(_chunk_logits(hidden_ND[part].to(dtype), weight, temperature, cap), dim=-1)
            logprobs[part] = logp.gather(1, ids_NK[part])
            if with_entropy:
                entropy[part] = -(logp.exp() * logp).sum(-1)
            room -= logp.numel()
            if room >= 0:
                kept[part.start] = logp
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK)
        ctx.settings = temperature, cap, with_entropy, dtype
        ctx.kept = kept
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs_NK, grad_entropy_N = grads
        hidden_ND, weight_VD, ids_NK = ctx.saved_tensors
        temperature, cap, with_entropy, dtype = ctx.settings
        weight = weight_VD.to(dtype)
        grad_hidden = torch.empty(hidden_ND.shape, dtype=hidden_ND.dtype, device=hidden_ND.device)
        # A frozen output matrix (an adapter is trained, not the base) gets no gradient and no buffer for one.
        frozen = not ctx.needs_input_grad[1]
        grad_weight = None if frozen else torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        for part in _chunks(len(hidden_ND), weight.shape[0]):
            hidden = hidden_ND[part].to(dtype)
            logits = None
            logp = ctx.kept.pop(part.start, None)  # it is given up here: a second backward pass computes it again
            if logp is None:
                logits = _chunk_logits(hidden, weight, temperature, cap)
                logp = torch.log_softmax(logits, dim=-1)
            if with_entropy:
                grad = logp.exp()
                entropy = -(grad * logp).sum(-1, keepdim=True)
                pull = logp.add_(entropy).mul_(grad_entropy_N[part, None])
                grad = grad.mul_(pull.add_(grad_logprobs_NK[part].sum(-1, keepdim=True))).neg_()
            else:
                grad = logp.exp_().mul_(-grad_logprobs_NK[part].sum(-1, keepdim=True))
            grad.scatter_add_(1, ids_NK[part], grad_logprobs_NK[part])
            if temperature != 1.0:
                grad.div_(temperature)
            if cap is not None and logits is not None:  # the logits were already divided by the temperature
                grad.mul_(1.0 - (logits * (temperature / cap)) ** 2)
            grad = grad.to(dtype)
            grad_hidden[part] = torch.matmul(grad, weight).to(hidden_ND.dtype)
            if grad_weight is not None and dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden)
            elif grad_weight is not None:
                grad_weight += torch.matmul(grad.t(), hidden).float()
        out = grad_weight.to(weight_VD.dtype) if grad_weight is not None else None
        return grad_hidden, out, None, None, None, None, None, None


class _CompiledHead(torch.autograd.Function):
    """`_ChunkedHead` with the passes over the vocabulary compiled, without a soft cap.

    The logits are kept for the backward pass, in the dtype of the product, if all of them are few enough. Otherwise
    the forward pass goes by rows, and the backward pass computes them again by parts of the vocabulary: each part of
    the output matrix's gradient, which may be far larger than the logits, is then written once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_NK: Tensor,
        temperature: float,
        cap: float | None,
        with_entropy: bool,
        dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        assert cap is None
        ctx.given = hidden_ND.dtype
        weight, hidden_ND = weight_VD.to(dtype), hidden_ND.to(dtype)
        ids_NK = ids_NK.contiguous()
        num_rows, vocab = len(hidden_ND), weight.shape[0]
        logprobs, totals, entropies = [], [], []
        ctx.kept = None
        is_small = num_rows * vocab <= KEPT_BYTES // dtype.itemsize
        for part in [slice(0, num_rows)] if is_small else _chunks(num_rows, vocab):
            logits = torch.matmul(hidden_ND[part], weight.t())
            logprobs_part, total, entropy = head_forward(logits, ids_NK[part], temperature, with_entropy)
            logprobs.append(logprobs_part)
            totals.append(total)
            entropies += [] if entropy is None else [entropy]
            ctx.kept = logits if keep and is_small else None
        entropy_N = torch.cat(entropies) if with_entropy else torch.zeros(0)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, torch.cat(totals), entropy_N)
        ctx.settings = temperature, with_entropy
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs_NK, grad_entropy_N = (grad.contiguous() for grad in grads)
        hidden_ND, weight_VD, ids_NK, total_N, entropy_N = ctx.saved_tensors
        temperature, with_entropy = ctx.settings
        own = (entropy_N, grad_entropy_N) if with_entropy else (None, None)
        weight = weight_VD.to(hidden_ND.dtype)
        kept, ctx.kept = ctx.kept, None  # they are given up here: a second backward pass computes them again
        width = len(weight) if kept is not None else max(64, MAX_LOGITS // max(1, len(hidden_ND)))
        grad_hidden = torch.zeros(hidden_ND.shape, dtype=torch.float32)
        # A frozen output matrix (an adapter is trained, not the base) gets no gradient and no buffer for one.
        grad_weight = torch.empty(weight_VD.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for first in range(0, len(weight), width):
            rows = weight[first : first + width]
            logits = kept if kept is not None else torch.matmul(hidden_ND, rows.t())
            head_backward_(logits, ids_NK - first, temperature, total_N, own[0], grad_logprobs_NK, own[1])
            grad_hidden += torch.matmul(logits, rows)
            if grad_weight is not None:
                grad_weight[first : first + width] = torch.matmul(logits.t(), hidden_ND)
        out = None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        return grad_hidden.to(ctx.given), out, None, None, None, None, None, None
