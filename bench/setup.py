"""Models and data of the benchmarks: random weights, random tokens, lengths as users' data have them.

Both sides of a comparison read the same folders and draw the same data from the same seed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CACHE = Path(__file__).parent / ".cache"
SPECIAL = ["<pad>", "<eos>", "<unk>"]
EOS = 1
CONTEXT = 1024
NUM_PROMPTS, NUM_SAMPLES, NEW_TOKENS = 8, 8, 64  # of a GRPO step
NUM_QUESTIONS, EQUAL_LENGTH = 32, 64  # of a call to the generator

SHAPES: dict[str, dict[str, Any]] = {
    # Seconds to run: for trying the harness itself.
    "tiny": {
        "architecture": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
    },
    "10m": {
        "architecture": "qwen3",
        "vocab_size": 8192,
        "hidden_size": 384,
        "num_layers": 4,
        "num_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1152,
    },
    "50m": {
        "architecture": "qwen3",
        "vocab_size": 32768,
        "hidden_size": 512,
        "num_layers": 10,
        "num_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1536,
    },
    # The layout of HuggingFaceTB/SmolLM2-135M (its config.json).
    "smollm2-135m": {
        "architecture": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
}
# A prototype of 1B class, for GPUs: the layout of a Llama 3.2 1B.
SHAPES["1b"] = {
    "architecture": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_layers": 16,
    "num_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}


@dataclass(frozen=True)
class Spec:
    """What one worker process is told.

    seconds   the length that one repetition aims at (training and scoring: as many updates or batches as fit)
    """

    work: str
    model: str
    side: str
    threads: int = 2
    precision: str = "fp32"
    seconds: float = 3.0
    seed: int = 0


def model_folder(name: str, kind: str = "model", **changes: Any) -> Path:
    """An ordinary Hugging Face checkpoint with random weights, made on first use; `reference` is a near relative."""
    suffix = "".join(f"-{key}{value}" for key, value in sorted(changes.items()))
    folder = CACHE / f"{name}{suffix}-{kind}"
    if (folder / "config.json").is_file():
        return folder
    from polm.models.loading import build_model, save_model  # not in a process of the peer, whose memory is measured

    shape = {**SHAPES[name], **changes}
    model = build_model(
        **shape, max_positions=8192, tie_embeddings=True, rope_theta=10000.0, seed=0, eos_token_id=EOS, pad_token_id=0
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far enough from uniform that an error in the attention shows in the loss.
            if parameter.ndim == 2:
                parameter.mul_(1.5)
            if kind == "reference":
                parameter.add_(torch.randn_like(parameter), alpha=0.005)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, build_tokenizer(shape["vocab_size"]), partial)
    partial.rename(folder)
    return folder


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a word; the word of token 7 is `w7`."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab_size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def load_peer_model(folder: Path) -> Any:
    """The same weights as `transformers` users load them."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def draw_lengths(rng: np.random.Generator, count: int, mean: float, sigma: float, low: int, high: int) -> np.ndarray:
    """`count` lognormal lengths of about this mean, cut to [low, high]."""
    values = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(values.round().astype(np.int64), low, high)


def draw_tokens(rng: np.random.Generator, vocab_size: int, count: int) -> np.ndarray:
    return rng.integers(len(SPECIAL), vocab_size, count)


def instructions(vocab_size: int, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, completion) of instruction data: total lengths lognormal, mean about 120, at most 512."""
    rng = np.random.default_rng((seed, 1))
    out = []
    for length in draw_lengths(rng, count, 120, 0.8, 8, 512).tolist():
        cut = max(2, round(length * rng.uniform(0.2, 0.6)))
        ids = draw_tokens(rng, vocab_size, length)
        ids[-1] = EOS
        out.append((ids[:cut], ids[cut:]))
    return out


def documents(vocab_size: int, count: int, seed: int) -> list[np.ndarray]:
    """Plain documents: lengths lognormal, mean about 300, at most 1,024."""
    rng = np.random.default_rng((seed, 2))
    lengths = draw_lengths(rng, count, 300, 0.8, 16, CONTEXT)
    return [draw_tokens(rng, vocab_size, n) for n in lengths.tolist()]


def preferences(vocab_size: int, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(prompt, chosen, rejected): prompts of mean 100 (at most 384), answers of mean 80 (at most 256)."""
    rng = np.random.default_rng((seed, 3))
    prompts = draw_lengths(rng, count, 100, 0.7, 8, 384).tolist()
    answers = draw_lengths(rng, 2 * count, 80, 0.7, 4, 256).tolist()
    out = []
    for i, length in enumerate(prompts):
        pair = [draw_tokens(rng, vocab_size, n) for n in answers[2 * i : 2 * i + 2]]
        pair[0][-1] = pair[1][-1] = EOS
        out.append((draw_tokens(rng, vocab_size, length), pair[0], pair[1]))
    return out


def questions(vocab_size: int, count: int, seed: int) -> list[np.ndarray]:
    """Prompts to answer: lengths lognormal, mean 80, at most 256."""
    rng = np.random.default_rng((seed, 4))
    return [draw_tokens(rng, vocab_size, n) for n in draw_lengths(rng, count, 80, 0.6, 8, 256).tolist()]


def answer_lengths(count: int, seed: int, mean: int = 64, high: int = 256) -> list[int]:
    """Strongly varying lengths of answers: lognormal with sigma 1, so that the longest is several times the mean."""
    return draw_lengths(np.random.default_rng((seed, 5)), count, mean, 1.0, 4, high).tolist()
