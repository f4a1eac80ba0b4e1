"""The peers' side: TRL's trainers and `transformers`' generate, each with the settings of `SETTINGS`.

`best` is what was found by trying (`python -m bench --tune`, bench/README.md); `defaults` is what a user gets who sets
nothing but the precision. Names that begin with `try-` are candidates for the tuning only.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.channel import Channel, Meter, measure_calls
from bench.setup import (
    EQUAL_LENGTH,
    NEW_TOKENS,
    NUM_PROMPTS,
    NUM_QUESTIONS,
    NUM_SAMPLES,
    SHAPES,
    Spec,
    answer_lengths,
    build_tokenizer,
    documents,
    instructions,
    load_peer_model,
    model_folder,
    preferences,
    questions,
)

# work -> side -> what is set otherwise than by default.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "best": {"packing": True, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
        "defaults": {},
        "try-no-checkpointing": {"gradient_checkpointing": False},
        "try-by-length": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"},
        "try-padding-free": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
        "try-padding-free-2": {
            "gradient_checkpointing": False,
            "padding_free": True,
            "max_length": None,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        },
        "try-batch-1": {
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
        },
    },
    "dpo": {
        "best": {
            "precompute_ref_log_probs": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "gradient_checkpointing": False,
        },
        "defaults": {},
        "try-batch-2": {
            "precompute_ref_log_probs": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
        },
        "try-batch-4": {
            "precompute_ref_log_probs": True,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
        },
        "try-batch-8": {"precompute_ref_log_probs": True, "gradient_checkpointing": False},
        "try-padding-free": {
            "precompute_ref_log_probs": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "padding_free": True,
        },
    },
    "grpo": {
        "best": {"per_device_train_batch_size": 16, "gradient_checkpointing": False},
        "defaults": {},
        "try-batch-8": {"gradient_checkpointing": False},
        "try-batch-32": {"per_device_train_batch_size": 32, "gradient_checkpointing": False},
        "try-batch-64": {"per_device_train_batch_size": 64, "gradient_checkpointing": False},
    },
    "scoring": {
        "best": {"batch": 4, "sort": True, "half": True},
        "defaults": {"batch": 8, "sort": False},
        "try-batch-1": {"batch": 1, "sort": True},
        "try-batch-4": {"batch": 4, "sort": True},
        "try-batch-8": {"batch": 8, "sort": True},
        "try-batch-16": {"batch": 16, "sort": True},
        "try-half": {"batch": 8, "sort": True, "half": True},
        "try-half-16": {"batch": 16, "sort": True, "half": True},
    },
    "generation-equal": {
        "best": {"batch": 32, "sort": False, "half": True, "cache_implementation": "static"},
        "defaults": {"batch": 8, "sort": False},
        "try-batch-16": {"batch": 16, "sort": True},
        "try-batch-32": {"batch": 32, "sort": False},
        "try-half": {"batch": 32, "sort": False, "half": True},
    },
    "generation-varying": {
        "best": {"batch": 8, "sort": False, "half": True},
        "defaults": {"batch": 8, "sort": False},
        "try-batch-32": {"batch": 32, "sort": False},
        "try-half-16": {"batch": 16, "sort": False, "half": True},
        "try-half-32": {"batch": 32, "sort": False, "half": True},
        "try-half-static-8": {"batch": 8, "sort": False, "half": True, "cache_implementation": "static"},
        "try-half-static-32": {"batch": 32, "sort": False, "half": True, "cache_implementation": "static"},
    },
}


def common_arguments(spec: Spec, folder: str) -> dict[str, Any]:
    """What both settings share: the precision, the length of the run, no logging and no saving."""
    return {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": spec.precision == "bf16",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "max_steps": 10**6,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": spec.seed,
    }


def build_callback(meter: Meter, sums: dict[str, float]) -> Any:
    """Ticks the meter at the end of each optimizer step with what has come together in `sums` since the last."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, state, control, kwargs
            current = dict(sums)
            sums.update(dict.fromkeys(sums, 0.0))
            meter.tick(**current)

    return Ticks()


def watch(trainer: Any, sums: dict[str, float], count: Callable[[Any], float]) -> None:
    """Count the units of each micro-batch that is trained on."""
    inner = trainer.training_step

    def step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sums["units"] += count(inputs)
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = step


def count_tokens(inputs: Any) -> float:
    mask = inputs.get("attention_mask")
    return float(inputs["input_ids"].numel() if mask is None else mask.sum())


def run_sft(channel: Channel, spec: Spec, settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = []
    for prompt, answer in instructions(SHAPES[spec.model]["vocab_size"], 2000, spec.seed):
        mask = [0] * len(prompt) + [1] * len(answer)
        rows.append({"input_ids": [*prompt.tolist(), *answer.tolist()], "completion_mask": mask})
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=load_peer_model(model_folder(spec.model)),
            args=SFTConfig(**common_arguments(spec, folder), completion_only_loss=True, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=build_tokenizer(SHAPES[spec.model]["vocab_size"]),
        )
        examples = [
            {
                "input_ids": row["input_ids"],
                "labels": [t if m else -100 for t, m in zip(row["input_ids"], row["completion_mask"], strict=True)],
            }
            for row in rows[:4]
        ]
        trainer.model.train()
        with torch.no_grad():
            guard = float(trainer.compute_loss(trainer.model, trainer.data_collator(examples)))
        sums = {"units": 0.0}
        watch(trainer, sums, count_tokens)
        trainer.add_callback(build_callback(Meter(channel, spec.seconds, guard=guard), sums))
        trainer.train()


def run_dpo(channel: Channel, spec: Spec, settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def words(ids: np.ndarray) -> str:
        return " ".join("<eos>" if t == 1 else f"w{t}" for t in ids.tolist())

    rows = []
    for prompt, good, bad in preferences(SHAPES[spec.model]["vocab_size"], 400, spec.seed):
        # TRL appends the end token itself.
        rows.append(
            {"prompt": words(prompt), "chosen": " " + words(good[:-1]) + " ", "rejected": " " + words(bad[:-1]) + " "}
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=load_peer_model(model_folder(spec.model)),
            ref_model=load_peer_model(model_folder(spec.model, "reference")),
            args=DPOConfig(**common_arguments(spec, folder), **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=build_tokenizer(SHAPES[spec.model]["vocab_size"]),
        )
        if settings.get("precompute_ref_log_probs"):
            trainer.ref_model = None  # it has been read for the last time
        trainer.model.train()
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        with torch.no_grad():
            guard = float(trainer.compute_loss(trainer.model, inputs))
        sums = {"units": 0.0}
        watch(trainer, sums, lambda inputs: inputs["input_ids"].shape[0] / 2)
        trainer.add_callback(build_callback(Meter(channel, spec.seconds, guard=guard), sums))
        trainer.train()


def run_grpo(channel: Channel, spec: Spec, settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    vocab_size = SHAPES[spec.model]["vocab_size"]
    prompts = questions(vocab_size, 128, spec.seed)
    rows = [{"prompt": " ".join(f"w{t}" for t in ids.tolist())} for ids in prompts]
    batch = settings.get("per_device_train_batch_size", 8)
    rng = np.random.default_rng(spec.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            **common_arguments(spec, folder),
            **settings,
            "gradient_accumulation_steps": NUM_PROMPTS * NUM_SAMPLES // batch,
            "num_generations": NUM_SAMPLES,
            "max_completion_length": NEW_TOKENS,
            "generation_kwargs": {"min_new_tokens": NEW_TOKENS},
        }
        trainer = GRPOTrainer(
            model=load_peer_model(model_folder(spec.model)),
            reward_funcs=lambda completions, **_: rng.integers(0, 2, len(completions)).astype(float).tolist(),
            args=GRPOConfig(**arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=build_tokenizer(vocab_size),
        )
        with torch.no_grad():
            ids = torch.from_numpy(np.concatenate(prompts[:2]))[None]
            logps = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), len(prompts[1])
            )[0]
            guard = float(-logps.mean())
        sums = {"units": 0.0, "generation": 0.0}
        generate = trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = generate(*args, **kwargs)
            sums["generation"] += time.perf_counter() - began
            assert all(len(ids) == NEW_TOKENS for ids in out[0])
            return out

        trainer._generate_single_turn = timed
        watch(trainer, sums, lambda _: batch / (NUM_PROMPTS * NUM_SAMPLES))
        trainer.add_callback(build_callback(Meter(channel, spec.seconds, warmup=1, guard=guard), sums))
        trainer.train()


def run_scoring(channel: Channel, spec: Spec, settings: dict[str, Any]) -> None:
    """A padded forward pass per batch, log-probabilities by TRL's own function."""
    from trl.trainer.utils import selective_log_softmax

    model = load_peer_model(model_folder(spec.model)).eval()
    texts = documents(SHAPES[spec.model]["vocab_size"], 64, spec.seed)

    @torch.no_grad()
    def annotate(texts: list[np.ndarray]) -> float:
        order = sorted(texts, key=len, reverse=True) if settings["sort"] else texts
        total = 0.0
        for first in range(0, len(order), settings["batch"]):
            part = [torch.from_numpy(ids) for ids in order[first : first + settings["batch"]]]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in part], batch_first=True)
            cast = spec.precision == "bf16" and model.dtype != torch.bfloat16
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logps = selective_log_softmax(logits, ids[:, 1:])
            total += float((logps * mask[:, 1:]).sum(dtype=torch.float64))
        return total

    guard = annotate(texts[:4]) / (sum(map(len, texts[:4])) - 4)
    if settings.get("half") and spec.precision == "bf16":
        model = model.to(torch.bfloat16)

    def call() -> dict[str, float]:
        annotate(texts)
        return {"units": float(sum(map(len, texts)))}

    measure_calls(channel, call, guard)


def run_generation(channel: Channel, spec: Spec, settings: dict[str, Any], *, varying: bool) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = load_peer_model(model_folder(spec.model)).eval()
    prompts = questions(SHAPES[spec.model]["vocab_size"], NUM_QUESTIONS, spec.seed)
    lengths = answer_lengths(len(prompts), spec.seed) if varying else [EQUAL_LENGTH] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if settings["sort"] else range(len(prompts))
    extra = {k: v for k, v in settings.items() if k not in ("batch", "sort", "half")}

    class Ends(StoppingCriteria):  # type: ignore[misc]
        """Each row is done after its own number of tokens, as if an end token had come."""

        def __init__(self, width: int, wanted: torch.Tensor):
            self.width, self.wanted = width, wanted

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            del scores, kwargs
            return input_ids.shape[1] - self.width >= self.wanted

    def answer(members: list[int], wanted: list[int], **how: Any) -> torch.Tensor:
        part = [torch.from_numpy(prompts[i]) for i in members]
        width = max(map(len, part))
        ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in part])
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in part])
        # The guard is in float32 on both sides: the likeliest of random weights' tokens are close together.
        # With `half` the weights are bf16 by then; a static cache takes no autocast.
        cast = spec.precision == "bf16" and how["do_sample"] and not settings.get("half")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(wanted),
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Ends(width, torch.tensor(wanted))]),
                **how,
            )
        return out[:, width:]

    greedy = answer(list(range(4)), [8] * 4, do_sample=False)
    guard = float((greedy[:, :4] * torch.arange(1, 5)).sum())
    if settings.get("half") and spec.precision == "bf16":
        model = model.to(torch.bfloat16)

    def call() -> dict[str, float]:
        for first in range(0, len(prompts), settings["batch"]):
            members = list(order)[first : first + settings["batch"]]
            answer(members, [lengths[i] for i in members], do_sample=True, top_k=0, **extra)
        return {"units": float(sum(lengths))}

    measure_calls(channel, call, guard, warmup=0)


RUNS: dict[str, Callable[[Channel, Spec, dict[str, Any]], None]] = {
    "sft": run_sft,
    "dpo": run_dpo,
    "grpo": run_grpo,
    "scoring": run_scoring,
    "generation-equal": lambda channel, spec, how: run_generation(channel, spec, how, varying=False),
    "generation-varying": lambda channel, spec, how: run_generation(channel, spec, how, varying=True),
}


def run(channel: Channel, spec: Spec) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    RUNS[spec.work](channel, spec, SETTINGS[spec.work][spec.side])


def describe(work: str, side: str) -> str:
    """The settings of a peer in a word or two, for the tables."""
    given = SETTINGS[work][side]
    return ", ".join(f"{key}={value}" for key, value in given.items()) or "as they are"
