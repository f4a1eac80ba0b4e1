"""The classifiers that stages train: reward models, process reward models, critics; whole or under an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from polm.data.packing import mix_seed
from polm.engine.adapted import find_layout, load_classifier, load_own_tokenizer
from polm.engine.device import pick_device
from polm.errors import ModelError, RecipeError
from polm.models.adapters import attach_adapter, is_adapter_folder
from polm.models.heads import Layout, build_scalar_model, load_quantized_classifier
from polm.models.loading import model_folder, save_model
from polm.recipe_adapter import AdapterSettings
from polm.stages.common import Base, Context, encode_init_text, load_base


@dataclass(frozen=True)
class Head:
    """What a stage wants of a classifier; `spread` and `seed` are those of a fresh head (see `build_scalar_model`)."""

    layout: Layout
    num_labels: int
    spread: float | None
    seed: int


def load_scalar_base(source: str, head: Head) -> Base:
    """A classifier to train: a fresh head on a language model, or one that is there already.

    An adapter is merged first. The padding token is the tokenizer's (see `_set_padding`).
    """
    name = model_folder(source)
    found = find_layout(name)
    if found is None:
        base = load_base(source, must_merge=True)
        model = build_scalar_model(
            base.model, head.layout, num_labels=head.num_labels, spread=head.spread, seed=head.seed
        )
        return _set_padding(Base(model, base.tokenizer, name))
    _require_layout(name, found, head.layout)
    model = load_classifier(name, num_labels=head.num_labels, device=pick_device(), must_merge=True)
    return _set_padding(Base(model, load_own_tokenizer(name), name))


def load_scalar_learner(
    context: Context, source: str, adapter: AdapterSettings | None, head: Head, *, base_folder: str = "base"
) -> Base:
    """`load_scalar_base`, under an adapter where one is wanted: it and the head are trained then.

    A source that is itself an adapter is merged first, and the merged classifier becomes part of the artifact
    (`base_folder`): it is the new adapter's base. `kind: continue` goes on training the old one instead.
    """
    folder = model_folder(source)
    if adapter is None:
        return load_scalar_base(source, head)
    if adapter.kind == "continue":
        found = find_layout(folder) if is_adapter_folder(folder) else None
        if found is None:
            raise RecipeError(
                f"adapter.kind: continue, but base={source} is no adapter of a {head.layout} classifier; name a kind, "
                "such as lora"
            )
        _require_layout(folder, found, head.layout)
        model = load_classifier(folder, num_labels=head.num_labels, device=pick_device(), trained=True)
        return _set_padding(Base(model, load_own_tokenizer(folder), folder))
    name = folder
    base = load_scalar_base(source, head) if adapter.quantize is None else _load_quantized(folder, head, adapter)
    if is_adapter_folder(folder):
        name = str(context.workdir / base_folder)
        save_model(base.model, base.tokenizer, context.workdir / base_folder)
        context.say(f"{source} is an adapter: it was merged into its base, which now lies in {name}")
    text = encode_init_text(base.tokenizer, adapter)
    attach_adapter(base.model, adapter, name, seed=mix_seed(head.seed, 0), init_ids=text)
    return base


def _load_quantized(folder: str, head: Head, adapter: AdapterSettings) -> Base:
    """`load_scalar_base` in 4 bits; the whole model is never in memory."""
    assert adapter.quantize is not None
    if is_adapter_folder(folder):
        raise RecipeError(f"adapter.quantize, and base={folder} is an adapter: merge it first (polm merge_adapter)")
    _require_layout(folder, find_layout(folder) or head.layout, head.layout)
    model = load_quantized_classifier(
        folder, head.layout, num_labels=head.num_labels, quantize=adapter.quantize, spread=head.spread, seed=head.seed
    )
    return _set_padding(Base(model, load_own_tokenizer(folder), folder))


def _require_layout(name: str, found: Layout, wanted: Layout) -> None:
    if found != wanted:
        raise ModelError(f"{name} is a {found} classifier, and a {wanted} classifier is needed here")


def _set_padding(base: Base) -> Base:
    """The padding token is the tokenizer's (the end-of-text token where it has none), as plain `transformers` needs
    it to find the last token of a padded text."""
    if base.tokenizer.pad_token_id is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    base.model.config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    return base
