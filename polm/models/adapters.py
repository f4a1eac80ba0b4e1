"""Adapters: a few trained weights on a frozen base. The one place that imports `peft`, an optional dependency.

`peft` changes the layers of our model in place (LoRA, DoRA, IA3) or keeps an encoder of virtual tokens, which we hang
into the model. Either way the model stays the `PreTrainedModel` that everything else works on: its parameters that
require a gradient are the adapter's, and it remembers its `Adapter`. A classifier's head is trained and saved with the
adapter, as a whole.

On disk an adapter is a folder in peft's own layout, with BASE_FILE beside it: which base it belongs to.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.errors import ModelError, UserError
from polm.models.forest_attention import FOREST
from polm.models.heads import (
    HEADS,
    SEPARATOR_FIELD,
    Layout,
    check_forest_values,
    compute_own_values,
    find_scalar_head,
    name_layout,
    random_head,
)
from polm.models.kernels.install import install_products
from polm.models.loading import build_check_ids, check_forest_logits, first_line, locate, whole_folder
from polm.models.virtual import VIRTUAL, VirtualTokens
from polm.recipe_adapter import AdapterSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "polm_base.json"
ADAPTER = "polm_adapter"  # attribute of a model
# peft's names of the kinds that we know; the value says whether the kind goes into the base's weights.
KNOWN_TYPES = {"LORA": True, "IA3": True, "PREFIX_TUNING": False, "PROMPT_TUNING": False, "P_TUNING": False}
# peft's names of what a model gives: the next token, or a classifier's values.
TASKS: dict[Layout | None, str] = {None: "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
PROMPT_PARTS = (".prompt_encoder.", ".modules_to_save.")  # in the names of what virtual tokens train
CONTINUED_TYPES = ("LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING")


@dataclass
class Adapter:
    """What a model knows about its adapter. `given` holds its tensors as they were loaded; None for a fresh one,
    without which the model is its base."""

    wrapper: Any  # peft's PeftModel, which holds the model
    base: str  # where the base lies
    given: dict[str, Tensor] | None = None
    is_off: bool = False

    @property
    def peft_type(self) -> str:
        return str(self.wrapper.active_peft_config.peft_type.value)

    @property
    def merges(self) -> bool:
        """Whether it is a change of layers, which can go into the weights."""
        return KNOWN_TYPES[self.peft_type]


def import_peft() -> Any:
    """The `peft` package, or UserError with the cure."""
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need `peft`, which is not installed: pip install 'polm[adapters]'") from error
    return peft


def find_adapter(model: PreTrainedModel) -> Adapter | None:
    """The adapter on a model; None on an ordinary one, and after merging."""
    found: Adapter | None = getattr(model, ADAPTER, None)
    return found


def adapter_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- a fresh adapter -----------------------------------------------------------------------------------------------


def attach_adapter(
    model: PreTrainedModel, settings: AdapterSettings, base: str, *, seed: int, init_ids: Sequence[int] = ()
) -> PreTrainedModel:
    """Put a fresh adapter on a language model or a classifier and freeze all but it (and the classifier's head);
    returns the same model.

    `base` is the folder or hub id that the model came from; `init_ids` are the tokens of `init_text`. Raises
    ModelError for layers that the model does not have, and for a model that peft or the forest cannot adapt.
    """
    peft = import_peft()
    torch.manual_seed(seed)
    config = _build_config(peft, model, settings)
    if settings.quantize is not None:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        wrapper = peft.get_peft_model(model, config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"adapter kind: {settings.kind} does not fit {base}: {first_line(error)}") from error
    if init_ids:
        wanted = settings.virtual_tokens or 0
        ids = torch.tensor([init_ids[i % len(init_ids)] for i in range(wanted)], device=model.device)
        table = wrapper.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            table.copy_(model.get_input_embeddings()(ids))
    return _adopt(model, Adapter(wrapper, base))


def _build_config(peft: Any, model: PreTrainedModel, s: AdapterSettings) -> Any:
    """peft's configuration of a kind. For a classifier peft trains and keeps the head too."""
    task = TASKS[name_layout(model)]
    if s.kind == "lora":
        return peft.LoraConfig(
            task_type=task,
            r=s.rank,
            lora_alpha=s.alpha,
            lora_dropout=s.dropout,
            target_modules=choose_targets(model, s.targets),
            use_rslora=s.rslora,
            use_dora=s.dora,
        )
    if s.kind == "ia3":
        targets = choose_targets(model, s.targets)
        feedforward = [name for name in s.feedforward or () if s.targets != "all-linear" or name in targets]
        return peft.IA3Config(task_type=task, target_modules=targets, feedforward_modules=feedforward)
    common: dict[str, Any] = {"task_type": task, "num_virtual_tokens": s.virtual_tokens}
    if s.kind == "prefix":
        width = s.encoder_width
        return peft.PrefixTuningConfig(**common, prefix_projection=width is not None, encoder_hidden_size=width)
    if s.kind == "prompt":
        return peft.PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB")
    return peft.PromptEncoderConfig(**common, encoder_hidden_size=s.encoder_width)


def _find_head(model: PreTrainedModel) -> nn.Module | None:
    """The layer that gives logits, or a classifier's values; it is not adapted."""
    return find_scalar_head(model) or model.get_output_embeddings()


def list_linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers without their place, the output head left out: q_proj, down_proj, …"""
    head = _find_head(model)
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Linear4bit", "Conv1D") and module is not head
    }
    return sorted(names)


def choose_targets(model: PreTrainedModel, targets: str | Sequence[str] | None) -> list[str]:
    """The layers to adapt, each by the last part of its name or by the whole; ModelError for one that is not there."""
    head = _find_head(model)
    known = list_linear_layers(model)
    if targets is None or isinstance(targets, str):
        return known
    full = {name for name, module in model.named_modules() if name.rpartition(".")[2] in known and module is not head}
    unknown = [t for t in targets if not any(name == t or name.endswith("." + t) for name in full)]
    if unknown:
        is_head = [name for name, module in model.named_modules() if module is head and name in unknown]
        why = "its logits are computed in chunks" if name_layout(model) is None else "it is trained as a whole"
        reason = f"; the output head is not adapted, as {why}" if is_head else ""
        raise ModelError(
            f"adapter targets {unknown}: {model.config.model_type} has no such linear layer (it has: "
            f"{', '.join(known)}; all-linear takes them all){reason}"
        )
    return sorted(targets)


def _adopt(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Hang the adapter into the model, and check that the forest computes what peft's own forward computes."""
    setattr(model, ADAPTER, adapter)
    install_products(model)
    if not adapter.merges:
        model.add_module("prompt_encoder", adapter.wrapper.prompt_encoder)
        setattr(model, VIRTUAL, functools.partial(_read_virtual, adapter))
    with _telling_head(model):
        _check(model, _compute_own(model, adapter), adapter.base)
    return model.train()


def _telling_head(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within, a classifier's head lets every difference through."""
    return nullcontext() if name_layout(model) is None else random_head(model)


def _check(model: PreTrainedModel, expected: Tensor, name: str) -> None:
    """ModelError where the forest does not give what `_compute_own` gave."""
    ids_T = build_check_ids(model)
    model.eval()
    if name_layout(model) is None:
        check_forest_logits(model, ids_T, expected, name)
    else:
        check_forest_values(model, ids_T, expected, name)


@torch.no_grad()
def _compute_own(model: PreTrainedModel, adapter: Adapter) -> Tensor:
    """What peft's forward gives with the attention of `transformers`: logits [T, V], or a classifier's values."""
    ids_T, layout = build_check_ids(model), name_layout(model)
    model.eval()
    model.set_attn_implementation("eager")
    try:
        if layout is not None:
            return compute_own_values(adapter.wrapper, layout, ids_T)
        logits: Tensor = adapter.wrapper(input_ids=ids_T[None], use_cache=False).logits[0, -len(ids_T) :]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{adapter.base} does not run with an adapter of type {adapter.peft_type}: {first_line(error)}"
        ) from error
    finally:
        model.set_attn_implementation(FOREST)
    return logits.float()


def _read_virtual(adapter: Adapter) -> VirtualTokens | None:
    """The virtual tokens of an adapter as its encoder computes them now."""
    if adapter.is_off:
        return None
    num = int(adapter.wrapper.active_peft_config.num_virtual_tokens)
    found = adapter.wrapper.get_prompt(batch_size=1)
    if adapter.peft_type != "PREFIX_TUNING":
        return VirtualTokens(num, embeddings_PD=found[0])
    layers = {index: (layer.keys[0], layer.values[0]) for index, layer in enumerate(found.layers)}
    if any(key.shape[1] != num for key, _ in layers.values()):
        raise ModelError(f"{adapter.base}: a layer's window is shorter than the {num} virtual tokens; use fewer")
    return VirtualTokens(num, layers=layers)


# ---- without the adapter -------------------------------------------------------------------------------------------


@contextmanager
def as_given(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within: the model as the stage was given it. A fresh adapter is off; one that came with the base has the weights
    that it came with. A model without an adapter is handed on as it is."""
    adapter = find_adapter(model)
    if adapter is None:
        yield model
    elif adapter.given is not None:
        parameters = dict(model.named_parameters())
        now = {name: parameters[name].data for name in adapter.given}
        try:
            for name, tensor in adapter.given.items():
                parameters[name].data = tensor
            yield model
        finally:
            for name, tensor in now.items():
                parameters[name].data = tensor
    else:
        adapter.is_off = True  # virtual tokens
        try:
            with adapter.wrapper.disable_adapter() if adapter.merges else nullcontext():
                yield model
        finally:
            adapter.is_off = False


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The ordinary model that a base with an adapter is: layer changes go into the weights.

    Raises ModelError for virtual tokens, which are no weights of the base.
    """
    adapter = find_adapter(model)
    if adapter is None:
        return model
    if not adapter.merges:
        raise ModelError(
            f"an adapter of type {adapter.peft_type} on {adapter.base} cannot be merged: its virtual tokens stand "
            "before every text, and no change of the base's weights does the same. Keep base and adapter side by side "
            "(every stage reads the adapter's folder), or go on training it with adapter.kind=continue"
        )
    with _telling_head(model):
        expected = _compute_own(model, adapter)
        merged: PreTrainedModel = adapter.wrapper.merge_and_unload()
        delattr(merged, ADAPTER)
        for parameter in merged.parameters():
            parameter.requires_grad_(True)
        _check(merged, expected, f"{adapter.base} with its adapter merged")
    return merged.train()


# ---- on disk -------------------------------------------------------------------------------------------------------


def is_adapter_folder(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def save_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, base_fingerprint: str
) -> None:
    """Write the adapter on `model` in peft's layout, with its tokenizer; complete or not at all."""
    adapter = find_adapter(model)
    assert adapter is not None, "save_adapter needs a model with an adapter"
    place = locate(adapter.base)
    is_local = Path(adapter.base).is_dir()
    path = str(Path(adapter.base).resolve()) if is_local else place["pretrained_model_name_or_path"]
    config = adapter.wrapper.active_peft_config
    config.base_model_name_or_path, config.revision = path, place.get("revision")
    with whole_folder(folder, "the adapter") as temporary:
        adapter.wrapper.save_pretrained(str(temporary), save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # a model card to be filled in by hand
        _sort_config(temporary / CONFIG)
        note: dict[str, Any] = {"base": adapter.base if not is_local else os.path.relpath(path, folder.resolve())}
        note |= {"fingerprint": base_fingerprint, **_note_labels(model)}
        (temporary / BASE_FILE).write_text(json.dumps(note, indent=2) + "\n")
        tokenizer.save_pretrained(temporary)


def _sort_config(path: Path) -> None:
    """peft writes the targets in the order of a set, which differs from run to run."""
    values: dict[str, Any] = json.loads(path.read_text())
    lists = {k: sorted(set(v)) for k, v in values.items() if isinstance(v, list) and all(isinstance(x, str) for x in v)}
    path.write_text(json.dumps(values | lists, indent=2, sort_keys=True) + "\n")


def _note_labels(model: PreTrainedModel) -> dict[str, Any]:
    """What a classifier's config says beyond its base's, for which peft has no place."""
    if name_layout(model) is None:
        return {}
    separator = getattr(model.config, SEPARATOR_FIELD, None)
    names = [str(model.config.id2label[i]) for i in range(int(model.config.num_labels))]
    return {"labels": names, **({SEPARATOR_FIELD: separator} if separator is not None else {})}


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json; ModelError where it is damaged, of a kind that we do not know, or names code to import."""
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); copy or train the adapter again") from error
    if kind not in KNOWN_TYPES:
        raise ModelError(f"{path}: an adapter of type {kind}; polm reads {', '.join(KNOWN_TYPES)}")
    if values.get("megatron_config"):  # peft would import the module that the file names
        raise ModelError(f"{path}: megatron_config is set; polm loads no adapter that names code to import")
    if not (path.parent / WEIGHTS).is_file():
        raise ModelError(f"{path.parent} has no {WEIGHTS}; other formats of weights are not read")
    return dict(values)


def _read_note(folder: str | Path) -> dict[str, Any]:
    """What BASE_FILE says; nothing for an adapter from elsewhere."""
    path = Path(folder) / BASE_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); remove it") from error


def read_adapter_layout(folder: str | Path) -> Layout | None:
    """The layout of the classifier that an adapter belongs to; None for a language model's."""
    task = read_adapter_config(folder).get("task_type")
    return next((layout for layout, name in TASKS.items() if name == task), None)


def read_labels(folder: str | Path) -> tuple[list[str], str | None]:
    """(names of the labels, separator of steps) of a classifier's adapter.

    One from elsewhere says no names: they are counted on its head. ModelError where it has none.
    """
    note = _read_note(folder)
    names, separator = note.get("labels"), note.get(SEPARATOR_FIELD)
    if isinstance(names, list) and names:
        return [str(name) for name in names], None if separator is None else str(separator)
    try:
        with safe_open(Path(folder) / WEIGHTS, "pt") as file:
            found = [key for key in file.keys() if key.endswith(tuple(f"{head}.weight" for head in HEADS))]  # noqa: SIM118
            num = int(file.get_slice(found[0]).get_shape()[0]) if found else 0
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{Path(folder) / WEIGHTS} cannot be read ({first_line(error)}); copy it again") from error
    if not num:
        raise ModelError(
            f"the adapter {folder} of a classifier lacks the head ({' or '.join(HEADS)}); save it with modules_to_save"
        )
    return [f"LABEL_{i}" for i in range(num)], None


def locate_base(folder: str | Path) -> tuple[str, str | None]:
    """(folder or hub id of an adapter's base, its fingerprint if it is known).

    The path in adapter_config.json is tried first, then the place relative to the adapter. Raises ModelError where
    there is nothing at either.
    """
    values, note = read_adapter_config(folder), _read_note(folder)
    named = str(values.get("base_model_name_or_path") or "")
    beside = os.path.normpath(Path(folder).resolve() / str(note.get("base", "")))
    for place in (named, beside):
        if place and (Path(place) / "config.json").is_file():
            return place, note.get("fingerprint")
    looks_local = named.startswith(("/", ".", "~")) or named.count("/") > 1 or "\\" in named or not named
    if looks_local:
        raise ModelError(
            f"the base of the adapter {folder} is not where it was: no model at {named or '(none named)'}"
            + (f" or {beside}" if note else "")
            + f". Put its folder back there, or write where it lies now into base_model_name_or_path of {CONFIG}"
        )
    revision = values.get("revision")
    return (f"{named}@{revision}" if revision else named), note.get("fingerprint")


def _require_all_weights(peft: Any, wrapper: Any, folder: Path) -> None:
    """ModelError where the file lacks weights, or has some for layers that are not there; peft goes on without."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = set(file.keys())
    expected = set(peft.get_peft_model_state_dict(wrapper, save_embedding_layers=False))
    extra = found - expected - set(wrapper.state_dict())  # embeddings may be saved along
    for what, names in (("lacks weights for", expected - found), ("has weights for layers that are not there:", extra)):
        if names:
            shown = ", ".join(sorted(names)[:2])
            raise ModelError(f"the adapter {folder} {what} {shown} …: it belongs to another base, or was cut short")


def load_adapter(model: PreTrainedModel, folder: str | Path, base: str, *, trained: bool) -> PreTrainedModel:
    """Put the adapter of a folder on its base, a language model or the classifier that it belongs to; with `trained`
    it can be trained further."""
    peft = import_peft()
    kind = read_adapter_config(folder)["peft_type"]
    layout = read_adapter_layout(folder)
    if layout != name_layout(model):
        raise ModelError(
            f"the adapter {folder} belongs to a {f'{layout} classifier' if layout else 'language model'}, and "
            f"{base} was loaded as a {type(model).__name__}"
        )
    if trained and kind not in CONTINUED_TYPES:
        raise ModelError(
            f"the adapter {folder} (type {kind}) cannot be trained further: peft keeps what its encoder computed and "
            "not the encoder; start a prompt adapter, or train P-tuning longer"
        )
    is_prompt = not KNOWN_TYPES[kind]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            wrapper = peft.PeftModel.from_pretrained(
                model, str(folder), is_trainable=trained and not is_prompt, torch_device=str(model.device)
            )
        _require_all_weights(peft, wrapper, Path(folder))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ModelError(
            f"the adapter {folder} does not fit its base {base}: {first_line(error)}; it belongs to another base, or "
            "its files are damaged"
        ) from error
    for name, parameter in wrapper.named_parameters():
        parameter.requires_grad_(
            trained and (any(part in f".{name}" for part in PROMPT_PARTS) if is_prompt else parameter.requires_grad)
        )
    model = _adopt(model, Adapter(wrapper, base, given={}))
    adapter = find_adapter(model)
    assert adapter is not None
    adapter.given = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    return model
