"""`polm merge_adapter`: an adapter and its base as one ordinary checkpoint."""

from __future__ import annotations

from polm.engine.adapted import find_layout
from polm.errors import DataError
from polm.models.adapters import is_adapter_folder, read_labels
from polm.models.loading import count_parameters, save_model
from polm.recipe import MergeAdapterSettings
from polm.stages.common import Base, Context, Stage, StageResult, load_base, model_folder, start_stage
from polm.stages.scalar import Head, load_scalar_base


def run(settings: MergeAdapterSettings, context: Context) -> StageResult:
    """Write `model` (an adapter's artifact or folder) as an ordinary checkpoint; its log-probabilities (a classifier's
    values) are the same."""
    start_stage(settings, context)
    merged = load_merged(context.inputs["model"])
    save_model(merged.model, merged.tokenizer, context.workdir / "model")
    return StageResult({"parameters": count_parameters(merged.model)})


def load_merged(source: str) -> Base:
    """The model or classifier that an adapter and its base are; DataError for what is no adapter."""
    folder = model_folder(source)
    if not is_adapter_folder(folder):
        raise DataError(f"model={source} is no adapter (no adapter_config.json): there is nothing to merge")
    layout = find_layout(folder)
    if layout is None:
        return load_base(source, must_merge=True)
    labels, _ = read_labels(folder)
    return load_scalar_base(source, Head(layout, len(labels), spread=None, seed=0))


STAGE = Stage(
    "merge_adapter",
    "transform",
    MergeAdapterSettings,
    run,
    inputs=("model",),
    summary="an adapter and its base as one ordinary checkpoint",
)
