"""Adapters with their bases, and classifiers with or without an adapter: what stages and rewards load from a folder.

The loaders of `models` read one folder; an adapter is two, and its base must be the one that it was trained on.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.data.fingerprint import fingerprint_path
from polm.errors import ModelError
from polm.models.adapters import (
    find_adapter,
    is_adapter_folder,
    load_adapter,
    locate_base,
    merge_adapter,
    read_adapter_layout,
    read_labels,
)
from polm.models.heads import SEPARATOR_FIELD, Layout, build_scalar_model, load_scalar_model, read_layout
from polm.models.loading import load_model, load_tokenizer


def fingerprint_base(source: str) -> str:
    """What an adapter's base is: the content of its folder, or the hub id as it is."""
    path = Path(source)
    return fingerprint_path(path) if path.is_dir() else f"hub:{source}"


def locate_own_base(folder: str) -> str:
    """Where an adapter's base lies; ModelError where another one lies there now."""
    place, fingerprint = locate_base(folder)
    if fingerprint is not None and fingerprint_base(place) != fingerprint:
        raise ModelError(
            f"the base of the adapter {folder}, {place}, is not the one that it was trained on (fingerprint "
            f"{fingerprint_base(place)[:12]}, expected {fingerprint[:12]}); put the former back, or train again"
        )
    return place


def load_own_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint; of an adapter that brings none, its base's."""
    is_bare = is_adapter_folder(folder) and not (Path(folder) / "tokenizer_config.json").is_file()
    return load_tokenizer(locate_base(folder)[0] if is_bare else folder)


def load_adapted_model(folder: str, *, trained: bool, device: str) -> PreTrainedModel:
    """A language model under the adapter of a folder."""
    if read_adapter_layout(folder) is not None:
        raise ModelError(
            f"the adapter {folder} belongs to a reward model or another classifier, and a causal language model is "
            "needed here; give the model that it was made from"
        )
    place = locate_own_base(folder)
    return load_adapter(load_model(place, device=device), folder, place, trained=trained)


def find_layout(source: str) -> Layout | None:
    """The layout of a classifier or of a classifier's adapter; None for a language model's."""
    return read_adapter_layout(source) if is_adapter_folder(source) else read_layout(source)


def load_classifier(
    source: str, *, num_labels: int, device: str = "cpu", trained: bool = False, must_merge: bool = False
) -> PreTrainedModel:
    """A classifier from a checkpoint or from an adapter on a language model or a classifier.

    An adapter comes merged into its base. Virtual tokens cannot be: they stay beside it, frozen, or with `must_merge`
    are refused. With `trained` an adapter is left as it is, to be trained further. Raises ModelError for another
    number of labels, for a language model's adapter, and for what `load_scalar_model` refuses.
    """
    if not is_adapter_folder(source):
        return load_scalar_model(source, num_labels=num_labels, device=device)
    layout = read_adapter_layout(source)
    if layout is None:
        raise ModelError(
            f"{source} is an adapter of a language model; train a reward model from it first (polm reward_model, "
            "polm process_reward_model)"
        )
    place = locate_own_base(source)
    labels, separator = read_labels(source)
    if len(labels) != num_labels:
        raise ModelError(f"the adapter {source} has {len(labels)} labels, and {num_labels} are needed here")
    if read_layout(place) is None:
        model = build_scalar_model(load_model(place, device=device), layout, num_labels=num_labels)
    else:
        model = load_scalar_model(place, num_labels=num_labels, device=device)
    model = load_adapter(model, source, place, trained=trained)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}
    if separator is not None:
        setattr(model.config, SEPARATOR_FIELD, separator)
    adapter = find_adapter(model)
    if adapter is not None and not trained and (adapter.merges or must_merge):
        return merge_adapter(model)
    return model
