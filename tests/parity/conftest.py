"""What the comparisons with TRL share: a tiny tokenizer and two tiny models, made here, nothing fetched."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.models.loading import prepare_model
from polm.tokens import Objective, TokenBatch, Tree, build_completions

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(40))]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <eos>{% endgeneration %} "
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
FAMILIES = ("qwen3", "llama")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `w7` has the id WORDS.index("w7")."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """A tiny random model in float32 with eager attention. Its config names a folder in which another one lies, with
    weights that differ a little: TRL loads its reference from there."""
    config = AutoConfig.for_model(
        request.param,
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform, so that an error in the log-probabilities would show
        bos_token_id=None,
        eos_token_id=WORDS.index("<eos>"),
        pad_token_id=WORDS.index("<pad>"),
    )
    torch.manual_seed(0)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    folder = tmp_path / "reference"
    built.save_pretrained(folder)
    built.config._name_or_path = str(folder)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return built


@pytest.fixture
def learner(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` on the token forest. Ask for it before a trainer gets hold of `model`."""
    return prepare_model(copy.deepcopy(model), "learner")


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """Arguments that all of TRL's configurations take."""
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


Agree = Callable[[Tensor, PreTrainedModel, Objective, PreTrainedModel, list[TokenBatch]], dict[str, float]]


@pytest.fixture
def agree() -> Agree:
    """A function that checks TRL's loss and gradients on its model against ours on the learner, and hands back our
    metrics. Several batches are the micro-batches of one update."""
    return check_agreement


def check_agreement(
    their_loss: Tensor,
    their_model: PreTrainedModel,
    objective: Objective,
    learner: PreTrainedModel,
    batches: list[TokenBatch],
) -> dict[str, float]:
    their_loss.backward()
    losses = [objective.compute(score(learner, batch, objective.needs), batch) for batch in batches]
    denominator = sum(float(loss.denominator) for loss in losses)
    our_loss = sum((loss.total for loss in losses), torch.zeros(())) / denominator
    our_loss.backward()
    # Losses that are near zero are differences of numbers near one (or were one until the caller took it off).
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5, abs=5e-7)
    theirs = {name: p.grad for name, p in their_model.named_parameters()}
    ours = {name: p.grad for name, p in learner.named_parameters()}
    assert ours.keys() == theirs.keys()
    norms = [torch.stack([g.norm() for g in grads.values() if g is not None]).norm() for grads in (ours, theirs)]
    assert norms[1] > 1e-3
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-4)
    for name, their_grad in theirs.items():
        our_grad = ours[name]
        assert their_grad is not None, name
        assert our_grad is not None, name
        assert (our_grad - their_grad).abs().max() <= 1e-4 * norms[1], name
    names = losses[0].metrics
    return {
        name: float(sum(loss.metrics[name].total for loss in losses))
        / sum(float(loss.metrics[name].count) for loss in losses)
        for name in names
        if losses[0].metrics[name].total.ndim == 0
    }


# ---- rollouts, in TRL's rows and in our trees ----------------------------------------------------------------------

GROUP = 3
LENGTHS = [7, 3, 5, 1, 6, 2]
MAX_COMPLETION_TOKENS = 7


@pytest.fixture
def rows() -> SimpleNamespace:
    """Two groups of three completions as TRL's trainers take them (`build_inputs`), and as trees (`build_trees`)."""
    return SimpleNamespace(build_inputs=build_inputs, build_trees=build_trees)


def build_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two groups of three completions of unlike length, with old log-probabilities off by up to 0.8."""
    generator = torch.Generator().manual_seed(3)
    size = (len(LENGTHS), MAX_COMPLETION_TOKENS)
    completion_mask = (torch.arange(size[1])[None] < torch.tensor(LENGTHS)[:, None]).long()
    completion_ids = torch.randint(5, 45, size, generator=generator) * completion_mask
    prompt_ids = torch.tensor([[6, 7, 8]] * GROUP + [[0, 9, 10]] * GROUP)
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    mask = torch.cat([(prompt_ids != 0).long(), completion_mask], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[:, -size[1] :, 0]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids != 0).long(),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.4, -0.8, 0.3, 0.7, -1.5]),
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": logprobs + 0.8 * (2 * torch.rand(size, generator=generator) - 1),
        "ref_per_token_logps": logprobs + 0.5 * torch.randn(size, generator=generator),
    }


def build_trees(inputs: dict[str, torch.Tensor], more: dict[str, str] | None = None) -> list[Tree]:
    """TRL's padded rows as one tree a prompt; `more` are further streams, theirs: ours."""
    names = {"old_per_token_logps": "old_logprobs", "ref_per_token_logps": "ref_logprobs", **(more or {})}
    trees = []
    for first in range(0, len(inputs["prompt_ids"]), GROUP):
        completions, streams = [], []
        for row in range(first, first + GROUP):
            kept = inputs["completion_mask"][row].bool()
            completions.append(inputs["completion_ids"][row][kept].numpy())
            advantage = np.full(len(completions[-1]), float(inputs["advantages"][row]))
            own = {ours: inputs[theirs][row][kept].numpy() for theirs, ours in names.items() if theirs in inputs}
            streams.append({"advantages": advantage, **own})
        prompt = inputs["prompt_ids"][first][inputs["prompt_mask"][first].bool()].numpy()
        trees.append(build_completions(prompt, completions, streams))
    return trees
