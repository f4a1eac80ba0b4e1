"""From settings to a backend: a server, or a model that is loaded here, with its replies kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.data.fingerprint import fingerprint_path
from polm.engine.device import pick_device, sample_in_bf16
from polm.errors import RecipeError
from polm.models.halved import halve_matrices
from polm.models.loading import count_parameters, load_model, load_tokenizer, model_folder
from polm.recipe_judge import EndpointSettings
from polm.rewards.backends import Backend, CachedBackend, LocalBackend
from polm.rewards.endpoint import build_endpoint

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerFast]


def open_backend(
    endpoint: EndpointSettings | None,
    source: str | None,
    *,
    role: str,
    precision: str,
    replies: Path | None,
    progress: Callable[[int, int], None] | None = None,
    loaded: Loaded | None = None,
) -> Backend:
    """The server `endpoint`, or the local model `source` (`loaded` where it is in memory already), exactly one of both.

    `replies` is the folder of the cache (None: no cache), `role` the name of the input, for errors.
    """
    if (endpoint is None) == (source is None):
        found = "neither is given" if source is None else f"found {role}={source} beside endpoint"
        raise RecipeError(f"give {role}=MODEL (a local model) or the setting endpoint (a server), not both: {found}")
    backend: Backend
    if endpoint is not None:
        backend = build_endpoint(endpoint)
    else:
        assert source is not None
        name = model_folder(source)
        model, tokenizer = loaded or (load_model(name, device=pick_device()).eval(), load_tokenizer(name))
        path = Path(name)
        key = f"local:{fingerprint_path(path)}" if path.exists() else f"hub:{name}"
        bf16 = sample_in_bf16(precision, model.device.type, count_parameters(model))
        is_halved = bf16 and loaded is None and halve_matrices(model) > 0
        form = "fp32" if not bf16 else "bf16 alone" if is_halved else "bf16"
        backend = LocalBackend(model, tokenizer, f"{key}:{form}", bf16)
    return backend if replies is None else CachedBackend(backend, replies, progress)
