"""Models and tokenizers in Hugging Face format: build, load, check, save.

A base is a local path or a hub id. Whatever is loaded is checked once: its log-probabilities by the token forest
must equal those of its own forward pass, so that an architecture which we would compute wrongly (state along the
stream, logits processed in a way that we do not know) is refused instead of trained wrongly.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from httpx import TransportError
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from polm.errors import ModelError, StoreError
from polm.models.forest_attention import FOREST, Attends, build_plan, round_rows
from polm.models.kernels.install import install_kernels, kernels_while_sampling, multiply_while_sampling
from polm.models.quantize import build_quantization, keep_differentiable
from polm.models.virtual import PrefixPlan, read_virtual
from polm.tokens import TokenBatch, build_completions, build_document, collate

CHECK_TOLERANCE = 1e-3
ADAPTER_CONFIG = "adapter_config.json"  # of peft
TURNED_ROWS = 64  # up to here a product with the output matrix first is the faster order, in float32
PLAIN_DECODER = "Use a plain attention decoder (Llama, Qwen, Mistral, OLMo-2, SmolLM, Gemma 3)"
LOADING_CURE = (
    "If it is a folder, its files are damaged or incomplete: copy or download it again. If it is a hub id, check its "
    "spelling and the connection, or give the folder of a copy on this machine"
)

# Its bars for files of a few megabytes would drown the stage's own progress.
transformers_logging.disable_progress_bar()


def build_model(
    *,
    architecture: str,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    max_positions: int,
    tie_embeddings: bool,
    rope_theta: float,
    seed: int,
    eos_token_id: int,
    pad_token_id: int,
) -> PreTrainedModel:
    """A model with random weights in the layout of a `transformers` architecture such as `qwen3` or `llama`."""
    known = sorted(AutoModelForCausalLM._model_mapping._model_mapping)
    if architecture not in known:
        raise ModelError(f"architecture {architecture!r} is not one that transformers knows; for example: llama, qwen3")
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        attention_dropout=0.0,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return prepare_model(model, architecture)


def load_model(
    source: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, quantize: str | None = None
) -> PreTrainedModel:
    """Load a causal language model from a folder or a hub id (`name` or `name@revision`), ready for the token forest.

    `quantize` keeps its linear layers in 4 bits (`models/quantize.py`). Raises ModelError naming what is missing and
    the cure.
    """
    name = require_source(source, "model")
    more = build_quantization(quantize) if quantize is not None else {}
    model: PreTrainedModel
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            **find(name), dtype=dtype, output_loading_info=True, **more
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model {name} could not be loaded: {first_line(error)}. {LOADING_CURE}") from error
    if any(key.startswith(("score.", "classifier.")) for key in report["unexpected_keys"]):
        raise ModelError(
            f"the model {name} is a reward model or another classifier, and a causal language model is needed here; "
            "give the model that it was made from"
        )
    require_all_weights(report["missing_keys"], name)
    if not more:
        return prepare_model(model.to(device), name)
    keep_differentiable(model)
    return prepare_model(model, name)


def require_all_weights(missing_keys: Iterable[str], name: str) -> None:
    """ModelError for weights that a checkpoint lacks: transformers would go on with random numbers in their place."""
    missing = sorted(missing_keys)
    if missing:
        raise ModelError(
            f"the model {name} lacks {len(missing)} of its weights ({', '.join(missing[:3])} …): its weight files and "
            "its config.json do not belong together, or a file is missing; copy or download it again"
        )


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or a hub id."""
    name = require_source(source, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(**find(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the tokenizer of {name} could not be loaded: {first_line(error)}. {LOADING_CURE}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{name} has only a slow tokenizer; a fast one (tokenizer.json) is needed for exact offsets")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    out: PreTrainedTokenizerFast = tokenizer
    return out


def model_folder(source: str) -> str:
    """A stage's artifact holds its model or adapter in `model/`; anything else is taken as it is."""
    inner = Path(source) / "model"
    return str(inner) if any((inner / name).is_file() for name in ("config.json", ADAPTER_CONFIG)) else source


def require_source(source: str | Path, what: str) -> str:
    """The name to hand to `from_pretrained`; a path that looks local must exist and hold a config."""
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        needed = "config.json" if what == "model" else "tokenizer_config.json"
        if not (path / needed).is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise ModelError(f"{path} is not a {what} folder: no {needed} in it (found {found})")
        return str(path)
    if path.exists() or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ModelError(f"no {what} folder at {name}; give a folder with a Hugging Face checkpoint, or a hub id")
    return name


def locate(name: str) -> dict[str, str]:
    """Arguments of `from_pretrained`: a folder as it is, a hub id with the revision after `@` if there is one."""
    if Path(name).is_dir():
        return {"pretrained_model_name_or_path": name}
    hub_id, _, revision = name.partition("@")
    return {"pretrained_model_name_or_path": hub_id, **({"revision": revision} if revision else {})}


def find(name: str) -> dict[str, str]:
    """`locate`, for loading: where the hub of an id cannot be reached, the libraries are told so first."""
    if not Path(name).is_dir():
        check_hub()
    return locate(name)


@cache
def check_hub() -> None:
    """Without a connection they would try every file of a model for 20 seconds, also those that are in the cache."""
    if constants.HF_HUB_OFFLINE:
        return
    for wait in (1.0, 0.0):  # one lost connection is not yet a hub out of reach
        try:
            get_session().head(constants.ENDPOINT, timeout=10.0)
        except TransportError:
            time.sleep(wait)
        else:
            return
    constants.HF_HUB_OFFLINE = True  # in this process


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def prepare_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Switch a causal language model to the forest attention and check that it computes the same numbers."""
    return switch_to_forest(
        model,
        name,
        own=lambda ids: torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1),
        read=partial(read_logprobs, model),
        what="log-probabilities",
        kind="a causal language model",
    )


Compute = Callable[[torch.Tensor], torch.Tensor]


def switch_to_forest(
    model: PreTrainedModel, name: str, *, own: Compute, read: Compute, what: str, kind: str
) -> PreTrainedModel:
    """Switch any decoder to the forest attention, and hold what it computes there against its own forward pass.

    own    token ids [T] -> numbers [T, ...] of the model's own forward
    read   hidden states [T, width] of the forest -> the same numbers
    what   names the numbers and `kind` the model, for errors

    Raises ModelError where they differ, are not finite, or cannot be computed.
    """
    _refuse_shared_frequencies(model, name)
    check_ids = build_check_ids(model)
    model.eval()
    with torch.no_grad():
        try:
            expected = own(check_ids)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"{name} does not run as {kind}: {first_line(error)}") from error
    if not torch.isfinite(expected).all():
        raise ModelError(f"{name} gives {what} that are not finite: its weights are damaged; copy or download it again")
    if not hasattr(model.config.get_text_config(), "num_attention_heads"):
        raise ModelError(f"{name} ({model.config.model_type}) has layers without attention. {PLAIN_DECODER}")
    try:
        model.set_attn_implementation(FOREST)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{name} ({model.config.model_type}) does not take a registered attention: {error}") from error
    for module in model.modules():  # each layer has read it from the config already
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
        if isinstance(inner := getattr(module, "attn_dropout", None), nn.Dropout):
            inner.p = 0.0
    check_forest(model, check_ids, expected, read, name, what)
    if install_kernels(model):
        with kernels_while_sampling():
            check_forest(model, check_ids, expected, read, name, what)
    return model.train()


def _refuse_shared_frequencies(model: PreTrainedModel, name: str) -> None:
    """Rotary embeddings whose frequencies come from the longest position of a call tie packed documents together."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    found = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)}
    if kinds := sorted(found & {"dynamic", "longrope"}):
        raise ModelError(
            f"{name}: its rotary embedding ({', '.join(kinds)}) depends on the longest sequence of a batch, so packed "
            "documents would not be independent; set rope_type in its config.json to default, linear, yarn or llama3"
        )


def build_check_ids(model: PreTrainedModel) -> torch.Tensor:
    """Twelve token ids to compare two forwards on, without the padding token, which a classifier would leave out."""
    size = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (12,), generator=generator)
    pad = model.config.get_text_config().pad_token_id
    return (ids if pad is None else torch.where(ids == pad, (ids + 1) % size, ids)).to(model.device)


def check_forest_logits(model: PreTrainedModel, ids: torch.Tensor, expected_TV: torch.Tensor, name: str) -> None:
    """`check_forest` on the log-probabilities of a language model, whose own logits are `expected_TV`."""
    expected = torch.log_softmax(expected_TV, -1)
    check_forest(model, ids, expected, partial(read_logprobs, model), name, "log-probabilities")


def read_logprobs(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V] from hidden states."""
    return torch.log_softmax(output_logits(model, hidden_ND), -1)


def check_forest(
    model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor, read: Compute, name: str, what: str
) -> None:
    """A stranger, then a prompt and its continuation as a child: the second tree must see only itself.

    `expected` is what `read` must make of the forest's hidden states of `ids` [T]. ModelError where it differs.
    """
    numbers = ids.cpu().numpy()
    batch = collate([build_document(numbers[::-1].copy()), build_completions(numbers[:5], [numbers[5:]])])
    with torch.no_grad():
        try:
            found = read(compute_hidden(model, batch.to(model.device))[len(numbers) :])
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            kind = model.config.model_type
            raise ModelError(f"{name} ({kind}) does not run as a token forest: {error}. {PLAIN_DECODER}") from error
    gap = float((found - expected).abs().max())
    low_precision = next(model.parameters()).dtype != torch.float32 or getattr(model, "is_quantized", False)
    if not gap <= (0.2 if low_precision else CHECK_TOLERANCE):
        raise ModelError(
            f"{name} ({model.config.model_type}) gives other {what} as a token forest than on its own "
            f"(largest difference {gap:.2g}): it carries state along the stream, or treats its outputs in a way that "
            f"polm does not reproduce. {PLAIN_DECODER}"
        )


def compute_hidden(
    model: PreTrainedModel, batch: TokenBatch, *, round_up: bool = False, noise_TD: torch.Tensor | None = None
) -> torch.Tensor:
    """Final hidden states of the stream, [T, width], after the last norm.

    A model's virtual tokens stand above all trees (`models/virtual.py`); their own states are not returned.
    With `round_up` the products of a CPU run over a round number of rows (see `round_rows`); the spare rows are cut off
    again.
    `noise_TD` is added to what the embedding layer gives.
    """
    virtual = read_virtual(model)
    before = virtual.num if virtual is not None else 0
    first = before if virtual is not None and virtual.embeddings_PD is not None else 0  # rows before the batch's own
    rows = first + batch.num_tokens
    spare = round_rows(rows) - rows if round_up and batch.tokens_T.device.type == "cpu" else 0
    plan: Attends = build_plan(
        batch, int(model.config.get_text_config().num_attention_heads), spare, before, round_up=round_up
    )
    ids = nn.functional.pad(batch.tokens_T, (0, spare))
    positions = nn.functional.pad(batch.positions_T + before, (0, spare))
    tokens = {"input_ids": ids[None]}
    is_above = virtual is not None and virtual.embeddings_PD is not None
    if is_above or noise_TD is not None:
        embedded_TD: torch.Tensor = model.get_input_embeddings()(ids)
        if noise_TD is not None:
            embedded_TD = embedded_TD + nn.functional.pad(noise_TD, (0, 0, 0, spare)).to(embedded_TD.dtype)
        tokens = {"inputs_embeds": embedded_TD[None]}
    if virtual is not None and virtual.embeddings_PD is not None:
        tokens = {"inputs_embeds": torch.cat([virtual.embeddings_PD, tokens["inputs_embeds"][0]])[None]}
        positions = torch.cat([torch.arange(first, device=positions.device), positions])
    elif virtual is not None and virtual.layers is not None:
        plan = PrefixPlan(plan, virtual.num, virtual.layers)
    out = model.get_decoder()(**tokens, position_ids=positions[None], attention_mask=None, use_cache=False, forest=plan)
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden[first:rows]


def output_head(model: PreTrainedModel) -> tuple[nn.Parameter, float | None]:
    """The output matrix [V, width] and the soft cap of the logits, if the architecture has one."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{model.config.model_type}: the output layer has a bias, which the chunked head lacks")
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return head.weight, cap


def output_logits(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Float32 logits [N, V] of a few positions (the generator's case; training uses the chunked head)."""
    weight, cap = output_head(model)
    logits = multiply_while_sampling(hidden_ND, weight, None, torch.float32)
    if logits is None:
        logits = _multiply_head(hidden_ND.to(weight.dtype), weight)
    return cap * torch.tanh(logits / cap) if cap is not None else logits


def _multiply_head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    if hidden_ND.device.type == "cpu" and len(hidden_ND) <= TURNED_ROWS and not torch.is_autocast_enabled("cpu"):
        return torch.mm(weight_VD, hidden_ND.t()).t().float()
    return torch.nn.functional.linear(hidden_ND, weight_VD).float()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint (safetensors); the folder appears complete or not at all."""
    with whole_folder(folder, "the model") as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        _forget_attention(temporary / "config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


@contextmanager
def whole_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder to write into, which then takes the name `folder`: it appears complete or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StoreError(
            f"{what} could not be written to {folder}: {first_line(error)}; free space and run again"
        ) from error


def _forget_attention(config: Path) -> None:
    """A saved config must not name our attention: any `transformers` program loads it."""
    values: dict[str, Any] = json.loads(config.read_text())
    for key in ("_attn_implementation", "attn_implementation"):
        values.pop(key, None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def count_parameters(model: PreTrainedModel) -> int:
    """Number of distinct parameters (tied ones once)."""
    return sum(p.numel() for p in model.parameters())
