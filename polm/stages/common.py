"""What every stage shares: its contract, the models and files it is given, and one way to train.

A stage has one signature: `run(settings, context) -> StageResult`. It writes into `context.workdir` only, and it may
find there what a killed run left; the store writes the manifest afterwards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.config import Settings
from polm.data.examples import Ledger
from polm.data.fingerprint import fingerprint_path, fingerprint_trees
from polm.data.packing import PackedTrees, mix_seed, pack_trees
from polm.data.readers import write_json
from polm.data.tree_store import AttachedTrees, measure_trees
from polm.engine.adapted import fingerprint_base, load_adapted_model, load_own_tokenizer
from polm.engine.annotate import Annotation, annotate_trees
from polm.engine.checkpoint import remove_checkpoints
from polm.engine.device import keep_freed_memory, pick_device, sample_in_bf16, set_threads, use_bf16
from polm.engine.fit import BatchSource, Part, fit
from polm.errors import DataError, ModelError, RecipeError, StoreError, UserError
from polm.models.actor_critic import ActorCritic
from polm.models.adapters import (
    adapter_parameters,
    as_given,
    attach_adapter,
    find_adapter,
    is_adapter_folder,
    merge_adapter,
    save_adapter,
)
from polm.models.halved import halve_matrices
from polm.models.loading import count_parameters, load_model, load_tokenizer, save_model
from polm.models.loading import model_folder as model_folder
from polm.models.virtual import read_virtual
from polm.recipe import PackedSettings, TrainSettings
from polm.recipe_adapter import AdapterSettings
from polm.text.chat import show_supervision
from polm.text.tokenizer import fingerprint_tokenizer, require_same_tokenizer
from polm.tokens import Array, Objective, Tree

Report = Callable[[Mapping[str, Any]], None]


def _silent(line: Mapping[str, Any]) -> None:
    del line


@dataclass(frozen=True)
class Context:
    """What a stage is given. `inputs` maps roles to folders (or hub ids); `report` takes progress lines."""

    workdir: Path
    inputs: Mapping[str, str]
    report: Report = _silent
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class StageResult:
    """What a stage hands to its manifest: flat numbers, and the token ledger."""

    summary: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage: `name` is its command, file and artifact folder. Raise `version` when its results change."""

    name: str
    kind: Literal["train", "transform", "produce"]
    settings: type[Settings]
    run: Callable[[Any, Context], StageResult]
    inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    version: int = 1
    summary: str = ""


@dataclass(frozen=True)
class Base:
    """A loaded model with its tokenizer, on its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str

    @property
    def max_positions(self) -> int:
        """Positions that a text may have; virtual tokens take theirs away."""
        virtual = read_virtual(self.model)
        taken = virtual.num if virtual is not None else 0
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)) - taken


def load_base(source: str, *, quantize: str | None = None, must_merge: bool = False) -> Base:
    """Model and tokenizer from an artifact, a folder or a hub id.

    An adapter comes merged into its base. Virtual tokens cannot be: they stay beside it, frozen, or with `must_merge`
    are refused.
    """
    name = model_folder(source)
    if is_adapter_folder(name):
        base = _load_adapted(name, trained=False)
        adapter = find_adapter(base.model)
        if adapter is not None and (adapter.merges or must_merge):
            merge_adapter(base.model)
    else:
        base = Base(load_model(name, device=pick_device(), quantize=quantize), load_tokenizer(name), name)
    rows = int(base.model.get_input_embeddings().weight.shape[0])
    if len(base.tokenizer) > rows:
        raise ModelError(
            f"{name}: the tokenizer has {len(base.tokenizer)} tokens and the model only {rows} embeddings; "
            "they do not belong together"
        )
    return base


def load_sampler(source: str, precision: str) -> tuple[Base, bool]:
    """A model that is only read, and whether it reads in bf16: then in bf16 alone, as far as `halve_matrices` goes."""
    base = load_base(source)
    bf16 = sample_in_bf16(precision, base.model.device.type, count_parameters(base.model))
    if bf16:
        halve_matrices(base.model)
    return base, bf16


def _load_adapted(folder: str, *, trained: bool) -> Base:
    """An adapter on its base."""
    return Base(load_adapted_model(folder, trained=trained, device=pick_device()), load_own_tokenizer(folder), folder)


def load_learner(context: Context, settings: TrainSettings) -> Base:
    """The model that a stage trains: the input `base`, under the adapter of the settings where there is one.

    A base that is itself an adapter is merged first, and the merged model becomes part of the artifact (`base/`): it
    is the new adapter's base. `kind: continue` goes on training the old one instead.
    """
    source, wanted = context.inputs["base"], settings.adapter
    folder = model_folder(source)
    if wanted is None:
        return load_base(source, must_merge=True)
    if wanted.kind == "continue":
        if not is_adapter_folder(folder):
            raise RecipeError(f"adapter.kind: continue, but base={source} is no adapter; name a kind, such as lora")
        return _load_adapted(folder, trained=True)
    if is_adapter_folder(folder):
        merged = load_base(source, must_merge=True)
        save_model(merged.model, merged.tokenizer, context.workdir / "base")
        context.say(f"{source} is an adapter: it was merged into its base, which now lies in {context.workdir}/base")
        source = str(context.workdir / "base")
    base = load_base(source, quantize=wanted.quantize)
    text = encode_init_text(base.tokenizer, wanted)
    attach_adapter(base.model, wanted, base.name, seed=mix_seed(settings.seed, 0), init_ids=text)
    return base


def encode_init_text(tokenizer: PreTrainedTokenizerFast, wanted: AdapterSettings) -> list[int]:
    """The tokens that virtual tokens start from; none where no text is named."""
    if wanted.init_text is None:
        return []
    ids: list[int] = tokenizer(wanted.init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RecipeError(f"adapter.init_text {wanted.init_text!r} has no tokens")
    return ids


@dataclass(frozen=True)
class Frozen:
    """A model that is only asked. With `given` it is the learner, asked as it was given to the stage."""

    model: PreTrainedModel
    given: bool = False

    @contextmanager
    def asked(self) -> Iterator[PreTrainedModel]:
        """The model without gradients and dropout."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if self.given:
                    with as_given(self.model) as model:
                        yield model
                else:
                    yield self.model
        finally:
            self.model.train(was_training)


def load_given(context: Context, learner: Base, role: str | None = None) -> Frozen:
    """The input `role` where it is given, else the learner as the stage was given it: with an adapter the same
    weights without it, otherwise a second copy."""
    if role is not None and role in context.inputs:
        other = load_base(context.inputs[role])
        require_same_tokenizer(learner.tokenizer, other.tokenizer, learner.name, other.name)
        return Frozen(other.model.eval())
    if find_adapter(learner.model) is not None:
        return Frozen(learner.model, given=True)
    return Frozen(load_base(context.inputs["base"]).model.eval())


def input_file(context: Context, role: str, name: str) -> Path:
    """A file of an input folder; the input may also be that file itself."""
    given = Path(context.inputs[role])
    path = given if given.is_file() else given / name
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in given.iterdir())[:10]) if given.is_dir() else "no such folder"
        raise DataError(f"{role}: expected the file {name} in {given}, or a path to such a file (found: {found})")
    return path


def train(
    context: Context,
    base: Base,
    source: BatchSource,
    objective: Objective,
    settings: TrainSettings,
    ledger: Ledger,
    *,
    temperature: float = 1.0,
    more: Mapping[str, Any] | None = None,
    pair: ActorCritic | None = None,
    critic: Base | None = None,
    parts: Sequence[Part] = (),
) -> StageResult:
    """Fit, save an ordinary checkpoint (or the adapter) to `model/`, and sum up. With `pair`, of `base` and `critic`,
    the critic is trained too, and goes to `critic/`."""
    result = fit(
        pair or base.model,
        source,
        objective,
        settings,
        context.workdir,
        temperature=temperature,
        report=context.report,
        parts=parts,
    )
    if critic is not None:
        save_learner(critic, context.workdir / "critic")
    saved = save_learner(base, context.workdir / "model")
    remove_checkpoints(context.workdir)
    numbers = {k: v for k, v in result.last.items() if isinstance(v, float) and k not in ("eta_seconds",)}
    summary = {
        "updates": result.num_updates,
        "tokens": result.tokens,
        "targets": result.targets,
        "parameters": count_parameters(base.model),
        "precision": "bf16" if use_bf16(settings.precision, base.model.device.type) else "fp32",
        **saved,
        **{f"last/{name}": value for name, value in numbers.items()},
        **(more or {}),
    }
    return StageResult(summary, {**ledger, **result.counts})


def save_learner(base: Base, folder: Path) -> dict[str, Any]:
    """Write what was trained; what the summary says about it."""
    adapter = find_adapter(base.model)
    if adapter is None:
        save_model(base.model, base.tokenizer, folder)
        return {}
    fingerprint = fingerprint_base(adapter.base)
    save_adapter(base.model, base.tokenizer, folder, fingerprint)
    trained = sum(p.numel() for p in adapter_parameters(base.model).values())
    return {"trained_parameters": trained, "adapter": adapter.peft_type, "base_fingerprint": fingerprint}


def train_on_trees(
    context: Context,
    base: Base,
    trees: Sequence[Tree],
    objective: Objective,
    settings: PackedSettings,
    ledger: Ledger,
    more: Mapping[str, Any] | None = None,
) -> StageResult:
    """The usual supervised stage: show an example, pack, train."""
    show_example(context, base.tokenizer, trees[0])
    packed = build_source(trees, settings, ledger)
    return train(context, base, packed, objective, settings, ledger, more=more)


def build_source(trees: Sequence[Tree], settings: PackedSettings, ledger: Ledger) -> PackedTrees:
    """Pack trees as the settings say, and count what packing did.

    A pair of two long answers is longer than the context; the longest tree then sets the length of the bins.
    """
    lengths = measure_trees(trees)
    bin_tokens = max(settings.bin_tokens, int(lengths.max(initial=0)))
    packed = pack_trees(
        trees,
        bin_tokens=bin_tokens,
        bins_per_update=settings.bins_per_update,
        micro_bins=settings.micro_bins,
        updates=settings.updates,
        epochs=settings.epochs,
        seed=settings.seed,
    )
    ledger["bins"] += len(packed.bins)
    num_trees, num_tokens = packed.count_unseen()
    ledger["not_reached"] += num_trees
    ledger["tokens_not_reached"] += num_tokens
    ledger["tokens_of_room_unused"] += len(packed.bins) * bin_tokens - ledger["tokens_kept"]
    return packed


def show_example(context: Context, tokenizer: PreTrainedTokenizerFast, tree: Tree) -> None:
    """Decode one example with its supervised tokens marked, before any training, to the screen and to a file."""
    parts = []
    for segment in tree:
        weights = segment.streams.get("weights", np.zeros(len(segment), dtype=np.float32))
        parts.append(show_supervision(tokenizer, segment.tokens, weights != 0))
    text = "\n".join(parts)
    (context.workdir / "example.txt").write_text(text + "\n", encoding="utf-8")
    context.say(f"one example, supervised tokens in ⟦ ⟧:\n{text}")


def start_stage(settings: Any, context: Context) -> None:
    """Fix what a stage's bits depend on, the number of threads; and set up the allocator."""
    set_threads(settings.threads)
    keep_freed_memory()
    context.workdir.mkdir(parents=True, exist_ok=True)


def reference_scores(
    context: Context,
    role: str,
    base: Base,
    trees: Sequence[Tree],
    *,
    top_k: int,
    bin_tokens: int,
    precision: str,
) -> Annotation:
    """Scores of the reference given as `role`: an `annotate` artifact, or a model that is annotated here, once."""
    source = context.inputs[role]
    if (Path(source) / "scores.safetensors").is_file():
        return load_annotation(Path(source), base.tokenizer, trees, top_k)
    reference = load_base(source)
    require_same_tokenizer(base.tokenizer, reference.tokenizer, base.name, reference.name)
    return cached_annotation(
        context.workdir / f"scores-{role}", reference, trees, context, top_k, bin_tokens, precision
    )


def cached_annotation(
    folder: Path,
    reference: Base,
    trees: Sequence[Tree],
    context: Context,
    top_k: int,
    bin_tokens: int,
    precision: str,
) -> Annotation:
    """Annotate into `folder`, or read what a killed run left there if it was made from the very same things."""
    wanted = annotation_fingerprint(reference.tokenizer, trees, reference.name, top_k)
    written = folder / "fingerprint.json"
    if written.is_file() and json.loads(written.read_text()) == wanted:
        return load_annotation(folder, reference.tokenizer, trees, top_k)
    with as_given(reference.model) as model:
        annotation = annotate_trees(
            model,
            trees,
            bin_tokens=bin_tokens,
            top_k=top_k,
            bf16=use_bf16(precision, model.device.type),
            report=lambda done, total: context.report({"update": done, "num_updates": total, "what": "annotate"}),
        )
    save_annotation(folder, annotation, wanted)
    return annotation


def annotation_fingerprint(
    tokenizer: PreTrainedTokenizerFast, trees: Sequence[Tree], model: str, top_k: int
) -> dict[str, Any]:
    """What scores belong to: the model's weights, the tokenizer, the data as token ids."""
    path = Path(model)
    return {
        "model": fingerprint_path(path) if path.exists() else model,
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "data": fingerprint_trees(trees),
        "top_k": top_k,
    }


def save_annotation(folder: Path, annotation: Annotation, fingerprint: Mapping[str, Any]) -> None:
    """Scores first, fingerprint last: a folder without a fingerprint is unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Array] = {"logprobs": annotation.logprobs}
    if annotation.top_ids is not None and annotation.top_logprobs is not None:
        arrays |= {"top_ids": annotation.top_ids.astype(np.int32), "top_logprobs": annotation.top_logprobs}
    save_file(arrays, folder / "scores.safetensors")
    write_json(folder / "fingerprint.json", fingerprint)


def load_annotation(folder: Path, tokenizer: PreTrainedTokenizerFast, trees: Sequence[Tree], top_k: int) -> Annotation:
    """Read scores; UserError where they belong to another tokenizer or other data, or lack the top-k."""
    try:
        found = json.loads((folder / "fingerprint.json").read_text())
        arrays = load_file(folder / "scores.safetensors")
        found["tokenizer"], found["data"], found["top_k"], arrays["logprobs"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(
            f"the scores in {folder} cannot be read ({error}); remove that folder and annotate again"
        ) from error
    checks = {"tokenizer": fingerprint_tokenizer(tokenizer), "data": fingerprint_trees(trees)}
    for what, expected in checks.items():
        if found[what] != expected:
            raise UserError(
                f"the scores in {folder} were made with another {what} (fingerprint {found[what][:12]}, expected "
                f"{expected[:12]}); run `polm annotate` with this {what} and with max_tokens set to this stage's "
                "bin_tokens"
            )
    if top_k and found["top_k"] < top_k:
        raise UserError(
            f"the scores in {folder} keep the top {found['top_k']} tokens, {top_k} are needed; "
            f"annotate with top_k={top_k}"
        )
    ids, values = arrays.get("top_ids"), arrays.get("top_logprobs")
    if not top_k or ids is None or values is None:
        return Annotation(arrays["logprobs"])
    return Annotation(arrays["logprobs"], ids[:, :top_k].astype(np.int64), values[:, :top_k])


def attach_annotation(trees: Sequence[Tree], prefix: str, annotation: Annotation) -> Sequence[Tree]:
    """Put scores beside the tokens, as the streams `<prefix>_logprobs` and, with top-k, `<prefix>_ids`, `_topk`."""
    streams = {f"{prefix}_logprobs": annotation.logprobs}
    if annotation.top_ids is not None and annotation.top_logprobs is not None:
        streams |= {f"{prefix}_ids": annotation.top_ids, f"{prefix}_topk": annotation.top_logprobs}
    return AttachedTrees(trees, streams)


def new_ledger() -> Ledger:
    return Counter()


def add_ledger(ledger: Ledger, other: Ledger, prefix: str) -> None:
    """Enter the counts of a part of the data that is kept apart, as `PREFIX_NAME`."""
    ledger.update({f"{prefix}_{name}": count for name, count in other.items()})


def free_memory() -> None:
    """Hand a dropped reference model's memory back before training starts."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
