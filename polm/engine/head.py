"""The head of a language model on the targets of a batch, in chunks: full logits [T, V] never exist.

Where the gradient that the log-probabilities will get is known beforehand (`slopes_NK`: next-token prediction, weights
of a frozen reference, distillation), the head's own gradient is computed in its forward pass, while a chunk's logits
are there: three products with the output matrix, and no logits are kept. Elsewhere (a ratio of policies, a margin) it
is known only after the objective: the forward pass then keeps what it can for the backward pass, which computes the
rest again.

Shape suffixes: N targets, D width, V vocabulary, K token ids scored per target (the target first).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polm.models.kernels.build import load_library
from polm.models.kernels.rows import head_backward_, head_forward, head_gradient_

MAX_LOGITS = 1 << 23  # logits of one chunk: 32 MB in float32
KEPT_LOGITS = 1 << 25  # log-probabilities kept for the backward pass; those of chunks beyond it are computed again
KEPT_BYTES = 4 * KEPT_LOGITS  # of logits that the compiled head keeps, or turns into their gradient at once
PART_NUMBERS = 1 << 20  # of the output matrix's gradient that a CPU computes at once: 4 MB in float32


@dataclass(frozen=True)
class HeadSettings:
    """How a head is computed: logits are capped (`cap * tanh(logits / cap)`), then divided by `temperature`; products
    run in `dtype`."""

    temperature: float
    cap: float | None
    dtype: torch.dtype


def compute_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_NK: Tensor,
    settings: HeadSettings,
    *,
    with_entropy: bool = False,
    slopes_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the ids [N, K] and entropies in nats [N] (empty unless asked for), float32.

    `slopes_NK` (float32) promises what gradient the log-probabilities will get. A backward pass that brings another is
    a RuntimeError; on a GPU, which is not waited for, gradients that are not numbers. The entropy is not computed then.
    """
    is_bf16 = settings.dtype == torch.bfloat16
    # A soft cap has a slope of its own, which the compiled head does not know.
    compiled = is_bf16 and settings.cap is None and hidden_ND.device.type == "cpu" and load_library() is not None
    if slopes_NK is not None and torch.is_grad_enabled():
        assert not with_entropy, "an objective that reads the entropy has no slopes"
        assert (slopes_NK.shape, slopes_NK.dtype) == (ids_NK.shape, torch.float32), "kernels read them as they lie"
        logprobs_NK: Tensor = _KnownHead.apply(hidden_ND, weight_VD, ids_NK, slopes_NK, settings, compiled)  # type: ignore[no-untyped-call]
        return logprobs_NK, hidden_ND.new_zeros(0, dtype=torch.float32)
    head = _CompiledHead if compiled else _ChunkedHead
    out: tuple[Tensor, Tensor] = head.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, ids_NK, settings, with_entropy, torch.is_grad_enabled()
    )
    return out


def split_rows(num_rows: int, vocab: int, limit: int | None = None) -> list[slice]:
    """Rows by chunks of at most `limit` logits (MAX_LOGITS where it is not given), a row at least."""
    rows = max(1, (limit or MAX_LOGITS) // vocab)
    return [slice(a, min(a + rows, num_rows)) for a in range(0, num_rows, rows)] or [slice(0, 0)]


def compute_chunk_logits(hidden: Tensor, weight: Tensor, temperature: float, cap: float | None) -> Tensor:
    """Float32 logits of one chunk, capped and tempered."""
    logits = torch.matmul(hidden, weight.t()).float()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.div_(temperature) if temperature != 1.0 else logits


def compute_logit_gradient(
    logp: Tensor,
    ids_NK: Tensor,
    grad_logprobs_NK: Tensor,
    grad_entropy_N: Tensor | None,
    logits: Tensor | None,
    settings: HeadSettings,
) -> Tensor:
    """Gradient of a chunk's logits [rows, V], float32, from its log-probabilities, which are overwritten.

    With p the predicted distribution, g_k the gradient of logprob k and h that of the entropy H:
    d loss / d logit_v = sum_k g_k (1[v = id_k] - p_v) - h p_v (log p_v + H). `logits` are needed where they are capped.
    """
    pull = grad_logprobs_NK.sum(-1, keepdim=True)
    if grad_entropy_N is not None:
        grad = logp.exp()
        entropy = -(grad * logp).sum(-1, keepdim=True)
        grad = grad.mul_(logp.add_(entropy).mul_(grad_entropy_N[:, None]).add_(pull)).neg_()
    else:
        grad = logp.exp_().mul_(-pull)
    grad.scatter_add_(1, ids_NK, grad_logprobs_NK)
    if settings.temperature != 1.0:
        grad.div_(settings.temperature)
    if settings.cap is not None:
        assert logits is not None, "the slope of the cap needs the logits"
        # They were already divided by the temperature.
        grad.mul_(1.0 - (logits * (settings.temperature / settings.cap)) ** 2)
    return grad


def _add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor, *, is_first: bool) -> None:
    """total [V, D] float32 += grad^T hidden, and = for the first chunk of rows."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.t(), hidden, beta=0 if is_first else 1)
        return
    # A product in bf16 adds nothing up in float32; by parts that a cache holds, both are read and written once.
    width = len(total) if grad.device.type != "cpu" else max(1, PART_NUMBERS // total.shape[1])
    for first in range(0, len(total), width):
        part = torch.matmul(grad[:, first : first + width].t(), hidden)
        if is_first:
            total[first : first + width] = part
        else:
            total[first : first + width] += part


def _compute_logp(hidden: Tensor, weight: Tensor, settings: HeadSettings) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of a chunk, and its logits where the slope of a cap needs them."""
    logits = compute_chunk_logits(hidden, weight, settings.temperature, settings.cap)
    return torch.log_softmax(logits, dim=-1), logits if settings.cap is not None else None


class _ChunkedHead(torch.autograd.Function):
    """(hidden, output matrix, ids) -> log-probabilities of ids and entropy.

    The backward pass takes the whole distributions that the forward pass kept, up to KEPT_LOGITS numbers, and computes
    the others again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_NK: Tensor,
        settings: HeadSettings,
        with_entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        weight = weight_VD.to(settings.dtype)
        logprobs = torch.empty(ids_NK.shape, dtype=torch.float32, device=hidden_ND.device)
        entropy = torch.zeros(ids_NK.shape[0] if with_entropy else 0, dtype=torch.float32, device=hidden_ND.device)
        kept: dict[int, Tensor] = {}  # first row of a chunk -> log-probabilities [rows, V]
        # The slope of the cap needs the logits themselves.
        room = KEPT_LOGITS if keep and settings.cap is None else 0
        for part in split_rows(len(hidden_ND), weight.shape[0]):
            logp, _ = _compute_logp(hidden_ND[part].to(settings.dtype), weight, settings)
            logprobs[part] = logp.gather(1, ids_NK[part])
            if with_entropy:
                entropy[part] = -(logp.exp() * logp).sum(-1)
            room -= logp.numel()
            if room >= 0:
                kept[part.start] = logp
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK)
        ctx.settings = settings, with_entropy
        ctx.kept = kept
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs_NK, grad_entropy_N = grads
        hidden_ND, weight_VD, ids_NK = ctx.saved_tensors
        settings, with_entropy = ctx.settings
        weight = weight_VD.to(settings.dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        # A frozen output matrix (an adapter is trained, not the base) gets no gradient and no buffer for one.
        grad_weight = torch.empty_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in split_rows(len(hidden_ND), weight.shape[0]):
            hidden = hidden_ND[part].to(settings.dtype)
            logits = None
            logp = ctx.kept.pop(part.start, None)  # it is given up here: a second backward pass computes it again
            if logp is None:
                logp, logits = _compute_logp(hidden, weight, settings)
            own = grad_entropy_N[part] if with_entropy else None
            grad = compute_logit_gradient(logp, ids_NK[part], grad_logprobs_NK[part], own, logits, settings)
            grad = grad.to(settings.dtype)
            grad_hidden[part] = torch.matmul(grad, weight).to(hidden_ND.dtype)
            if grad_weight is not None:
                _add_weight_gradient(grad_weight, grad, hidden, is_first=part.start == 0)
        out = grad_weight.to(weight_VD.dtype) if grad_weight is not None else None
        return grad_hidden, out, None, None, None, None


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
        settings: HeadSettings,
        with_entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        assert settings.cap is None
        ctx.given = hidden_ND.dtype
        weight, hidden_ND = weight_VD.to(settings.dtype), hidden_ND.to(settings.dtype)
        ids_NK = ids_NK.contiguous()
        num_rows, vocab = len(hidden_ND), weight.shape[0]
        logprobs, totals, entropies = [], [], []
        ctx.kept = None
        is_small = num_rows * vocab <= KEPT_BYTES // settings.dtype.itemsize
        for part in [slice(0, num_rows)] if is_small else split_rows(num_rows, vocab):
            logits = torch.matmul(hidden_ND[part], weight.t())
            logprobs_part, total, entropy = head_forward(logits, ids_NK[part], settings.temperature, with_entropy)
            logprobs.append(logprobs_part)
            totals.append(total)
            entropies += [] if entropy is None else [entropy]
            ctx.kept = logits if keep and is_small else None
        entropy_N = torch.cat(entropies) if with_entropy else torch.zeros(0)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, torch.cat(totals), entropy_N)
        ctx.settings = settings, with_entropy
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs_NK, grad_entropy_N = (grad.contiguous() for grad in grads)
        hidden_ND, weight_VD, ids_NK, total_N, entropy_N = ctx.saved_tensors
        settings, with_entropy = ctx.settings
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
            temperature = settings.temperature
            head_backward_(logits, ids_NK - first, temperature, total_N, own[0], grad_logprobs_NK, own[1])
            grad_hidden += torch.matmul(logits, rows)
            if grad_weight is not None:
                grad_weight[first : first + width] = torch.matmul(logits.t(), hidden_ND)
        out = None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        return grad_hidden.to(ctx.given), out, None, None, None, None


class _KnownHead(torch.autograd.Function):
    """(hidden, output matrix, ids, slopes) -> log-probabilities of ids, whose gradient will be `slopes_NK`.

    Each chunk's logits become their gradient as soon as they are there; nothing but the gradients of the two inputs is
    kept, in place of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_NK: Tensor,
        slopes_NK: Tensor,
        settings: HeadSettings,
        compiled: bool,
    ) -> Tensor:
        weight, ids_NK, slopes_NK = weight_VD.to(settings.dtype), ids_NK.contiguous(), slopes_NK.contiguous()
        logprobs = torch.empty(ids_NK.shape, dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND)
        # A frozen output matrix (an adapter is trained, not the base) gets no gradient and no buffer for one.
        grad_weight = torch.empty_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        limit = _choose_limit(hidden_ND.device.type, settings, compiled)
        for part in split_rows(len(hidden_ND), weight.shape[0], limit):
            hidden = hidden_ND[part].to(settings.dtype)
            if compiled:
                grad = torch.matmul(hidden, weight.t())
                logprobs[part] = head_gradient_(grad, ids_NK[part], settings.temperature, slopes_NK[part])
            else:
                logp, logits = _compute_logp(hidden, weight, settings)
                logprobs[part] = logp.gather(1, ids_NK[part])
                grad = compute_logit_gradient(logp, ids_NK[part], slopes_NK[part], None, logits, settings)
                grad = grad.to(settings.dtype)
                del logp, logits  # two chunks would lie beside each other
            grad_hidden[part] = torch.matmul(grad, weight).to(hidden_ND.dtype)
            if grad_weight is not None:
                _add_weight_gradient(grad_weight, grad, hidden, is_first=part.start == 0)
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        ctx.slopes_NK = slopes_NK
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the head's gradient was computed in its forward pass and given up by a backward pass")
        factor = check_promise(grads[0], ctx.slopes_NK)
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if factor is not None:
            grad_hidden, grad_weight = grad_hidden * factor, None if grad_weight is None else grad_weight.mul_(factor)
        return grad_hidden, grad_weight, None, None, None, None


def _choose_limit(device: str, settings: HeadSettings, compiled: bool) -> int:
    """Logits of a chunk whose gradient is known: each chunk reads and writes the whole of the output matrix's gradient,
    so they are as many as may be kept. The plain head on a CPU takes the chunks of its backward pass, for its bits."""
    if compiled:
        return KEPT_BYTES // settings.dtype.itemsize
    return MAX_LOGITS if device == "cpu" else KEPT_LOGITS


def check_promise(grad_NK: Tensor, slopes_NK: Tensor) -> Tensor | None:
    """Whether a gradient is what was promised. On a CPU: None, or RuntimeError. Elsewhere, where the host would have to
    wait for the answer: a factor for the gradients of the inputs, 1, or NaN, at which the training loop stops."""
    same = ((grad_NK == slopes_NK) | (grad_NK.isnan() & slopes_NK.isnan())).all()
    if same.device.type != "cpu":
        return torch.where(same, 1.0, math.nan)
    if not same:
        raise RuntimeError(
            "the head's gradient was computed for other slopes than the loss brings: the objective says that it is "
            "linear in the log-probabilities, and is not, or its total was scaled"
        )
    return None
