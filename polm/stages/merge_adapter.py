"""`polm merge_adapter`: an adapter and its base as one ordinary checkpoint."""

from __future__ import annotations

from polm.errors import DataError
from polm.models.adapters import is_adapter_folder
from polm.models.loading import count_parameters, save_model
from polm.recipe import MergeAdapterSettings
from polm.stages.common import Context, Stage, StageResult, load_base, model_folder, start_stage


def run(settings: MergeAdapterSettings, context: Context) -> StageResult:
    """Write `model` (an adapter's artifact or folder) as an ordinary checkpoint; its log-probabilities are the same."""
    start_stage(settings, context)
    source = context.inputs["model"]
    if not is_adapter_folder(model_folder(source)):
        raise DataError(f"model={source} is no adapter (no adapter_config.json): there is nothing to merge")
    merged = load_base(source, must_merge=True)
    save_model(merged.model, merged.tokenizer, context.workdir / "model")
    return StageResult({"parameters": count_parameters(merged.model)})


STAGE = Stage(
    "merge_adapter",
    "transform",
    MergeAdapterSettings,
    run,
    inputs=("model",),
    summary="an adapter and its base as one ordinary checkpoint",
)
