"""Models whose head gives numbers in place of a vocabulary: reward models, process reward models, critics.

They are Hugging Face's own classes, loaded, checked and saved as `loading` does it for language models. Layouts:

* `sequence`  AutoModelForSequenceClassification: what its forward returns is the value at the last token that is not
              the padding token. With one label: a reward model.
* `token`     AutoModelForTokenClassification: a value a label at every token. With two labels: a process reward model.

In both a head stands behind the last norm and is read here at every token of the stream, so a critic may have either
layout. A dropout before the head is not computed.

Shape suffixes: T tokens of the stream, D width, L labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from polm.errors import ModelError
from polm.models.loading import (
    LOADING_CURE,
    check_forest,
    find,
    first_line,
    require_all_weights,
    require_source,
    switch_to_forest,
)
from polm.models.quantize import build_quantization, keep_differentiable

Layout = Literal["sequence", "token"]
CLASSES: dict[Layout, Any] = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
SUFFIXES: dict[Layout, str] = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
HEADS = ("score", "classifier")  # what transformers calls the head of its classifiers
SEPARATOR_FIELD = "step_separator"  # of a process reward model's config: the text behind each step
# Prefixes of the check's ids that a sequence classifier is run on: it gives one value a sequence.
CHECKED_LENGTHS = (3, 5, 8, 12)


def find_scalar_head(model: PreTrainedModel) -> nn.Linear | None:
    """The linear head [L, D] of a classifier; None for a model without one, such as a language model.

    Under an adapter it is the copy that is trained with the adapter, or the original while the adapter is off.
    """
    heads = (_unwrap(getattr(model, name, None)) for name in HEADS)
    return next((head for head in heads if isinstance(head, nn.Linear)), None)


def _unwrap(head: Any) -> Any:
    """The layer that computes behind a wrapper of peft (`modules_to_save`)."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    return head.original_module if head.disable_adapters else copies[head.active_adapters[0]]


def compute_values(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """Values of the final hidden states (`loading.compute_hidden`), float32 [T, L], with gradients.

    The head is computed in float32 under autocast too: it is small, and rewards are differences. Raises ModelError for
    a model without such a head.
    """
    head = find_scalar_head(model)
    if head is None:
        raise ModelError(
            f"{model.config.model_type}: values were asked of a model without a head that gives them; build one with "
            "build_scalar_model, or give a sequence or token classification checkpoint"
        )
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return nn.functional.linear(hidden_TD.float(), head.weight.float(), bias)


def read_layout(source: str | Path) -> Layout | None:
    """The layout that the config of a checkpoint names; None for a language model.

    Raises ModelError for a checkpoint that cannot be found.
    """
    name = require_source(source, "model")
    try:
        architectures = AutoConfig.from_pretrained(**find(name)).architectures or ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the model {name} could not be loaded: {first_line(error)}. {LOADING_CURE}") from error
    return next((layout for layout, suffix in SUFFIXES.items() if any(a.endswith(suffix) for a in architectures)), None)


def load_scalar_model(
    source: str | Path, *, num_labels: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a sequence or token classification checkpoint with `num_labels` labels, ready for the token forest.

    Raises ModelError for a checkpoint of another kind or number of labels, and for what `load_model` refuses.
    """
    name = require_source(source, "model")
    layout = read_layout(name)
    if layout is None:
        raise ModelError(
            f"{name} is a language model: its config names no class that ends in {' or '.join(SUFFIXES.values())}; "
            "train a reward model from it first (polm reward_model, polm process_reward_model)"
        )
    model: PreTrainedModel
    try:
        model, report = CLASSES[layout].from_pretrained(**find(name), dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model {name} could not be loaded: {first_line(error)}. {LOADING_CURE}") from error
    require_all_weights(report["missing_keys"], name)
    if int(model.config.num_labels) != num_labels:
        raise ModelError(f"{name} has {model.config.num_labels} labels, and {num_labels} are needed here")
    return prepare_scalar_model(model.to(device), name, layout)


def load_quantized_classifier(
    source: str | Path, layout: Layout, *, num_labels: int, quantize: str, spread: float | None, seed: int
) -> PreTrainedModel:
    """The classifier of a checkpoint, all linear layers but the head in 4 bits (`models/quantize.py`).

    A language model is given a fresh head, as `build_scalar_model` makes it. Raises ModelError as `load_scalar_model`
    does.
    """
    name = require_source(source, "model")
    more = build_quantization(quantize, skip=(*HEADS, "lm_head"))
    model: PreTrainedModel
    try:
        model, report = CLASSES[layout].from_pretrained(
            **find(name), num_labels=num_labels, dtype=torch.float32, output_loading_info=True, **more
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model {name} could not be loaded: {first_line(error)}. {LOADING_CURE}") from error
    keep_differentiable(model)
    missing = [key for key in report["missing_keys"] if not key.startswith(HEADS)]
    require_all_weights(missing, name)
    if len(missing) < len(report["missing_keys"]):
        head = _require_head(model, name)
        width = head.weight.shape[1]
        _fill_linear(head, 1.0 / math.sqrt(width + 1) if spread is None else spread, seed)
    return prepare_scalar_model(model, name, layout)


def build_scalar_model(
    base: PreTrainedModel,
    layout: Layout,
    *,
    num_labels: int = 1,
    spread: float | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A classifier with the trunk of a language model (copied) and a fresh head.

    spread   standard deviation of the head's normal weights; None = 1 / sqrt(D + 1), with which values begin with a
             spread near 1 (Stiennon et al. 2020, arXiv 2009.01325, their code); 0 = all values begin at 0. A bias
             begins at 0. Drawn from `seed` alone.

    The padding token of the config, which a sequence classifier skips at the end, is the base's. Raises ModelError
    where transformers has no such class for the architecture.
    """
    name = f"the {layout} classifier of {base.config.name_or_path or base.config.model_type}"
    config = copy.deepcopy(base.config.get_text_config())
    config.num_labels = num_labels
    config.classifier_dropout = 0.0
    try:
        model: PreTrainedModel = CLASSES[layout].from_config(config, dtype=base.dtype, attn_implementation="sdpa")
        model.get_decoder().load_state_dict(base.get_decoder().state_dict())
    except (ValueError, RuntimeError) as error:
        other = "token" if layout == "sequence" else "sequence"
        raise ModelError(f"{name} cannot be built: {first_line(error)}. Try the layout {other}") from error
    spread = 1.0 / math.sqrt(config.hidden_size + 1) if spread is None else spread
    _fill_linear(_require_head(model, name), spread, seed)
    return prepare_scalar_model(model.to(base.device), name, layout)


def _fill_linear(head: nn.Linear, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(spread * torch.randn(head.weight.shape, generator=generator))
        if head.bias is not None:
            head.bias.zero_()


def prepare_scalar_model(model: PreTrainedModel, name: str, layout: Layout) -> PreTrainedModel:
    """Switch a classifier to the forest attention, and check that its values are those of its own forward pass.

    A value that is not a finite number is refused with the head as it is.
    """
    head = _require_head(model, name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # the one before the head, which `compute_values` does not have
            module.p = 0.0
    if not all(bool(torch.isfinite(p).all()) for p in head.parameters()):
        raise ModelError(f"{name} has a head that is not finite: its weights are damaged; copy or download it again")
    with random_head(model):
        return switch_to_forest(
            model,
            name,
            own=partial(compute_own_values, model, layout),
            read=partial(_read_values, model),
            what="values",
            kind=f"a {layout} classifier",
        )


@contextmanager
def random_head(model: PreTrainedModel) -> Iterator[None]:
    """Within, the head holds random numbers: a check of values would see no difference through one of zeros."""
    head = _require_head(model, model.config.model_type)
    kept = [p.detach().clone() for p in head.parameters()]
    try:
        _fill_linear(head, 1.0 / math.sqrt(head.weight.shape[1]), seed=0)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(head.parameters(), kept, strict=True):
                parameter.copy_(before)


def name_layout(model: PreTrainedModel) -> Layout | None:
    """The layout of a loaded model; None for a language model."""
    return next((layout for layout, suffix in SUFFIXES.items() if type(model).__name__.endswith(suffix)), None)


def compute_own_values(forward: Callable[..., Any], layout: Layout, ids_T: Tensor) -> Tensor:
    """Values of a classifier's own forward at the ends of CHECKED_LENGTHS, float32 [lengths, L]."""
    if layout == "token":  # virtual tokens of an adapter stand before the ids
        values_TL: Tensor = forward(input_ids=ids_T[None]).logits[0, -len(ids_T) :]
        return values_TL[[length - 1 for length in CHECKED_LENGTHS]].float()
    return torch.cat([forward(input_ids=ids_T[None, :length]).logits for length in CHECKED_LENGTHS]).float()


def _read_values(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    return compute_values(model, hidden_TD)[[length - 1 for length in CHECKED_LENGTHS]]


def check_forest_values(model: PreTrainedModel, ids_T: Tensor, expected: Tensor, name: str) -> None:
    """`check_forest` on the values of a classifier; `expected` is what `compute_own_values` gave."""
    check_forest(model, ids_T, expected, partial(_read_values, model), name, "values")


def _require_head(model: PreTrainedModel, name: str) -> nn.Linear:
    head = find_scalar_head(model)
    if head is None:
        raise ModelError(
            f"{name} ({model.config.model_type}) has no linear head named {' or '.join(HEADS)} behind its trunk; use a "
            "plain decoder (Llama, Qwen, Mistral, OLMo-2, SmolLM, Gemma 3)"
        )
    return head
