"""What the tests share: a tiny data set, a tiny tokenizer, tiny models, and each stage run once a session."""

from __future__ import annotations

import os

# Before torch or anything of Hugging Face is imported. Bits are promised on the CPU: set CUDA_VISIBLE_DEVICES to
# run the tests on a GPU all the same.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.config import Settings
from polm.data.readers import read_documents
from polm.demo.corpus import build_demo_dataset
from polm.flywheel.store import Work, execute, external_key
from polm.models.loading import build_model, load_tokenizer, save_model
from polm.recipe import (
    AnnotateSettings,
    DPOSettings,
    EvalSettings,
    GRPOSettings,
    MicroscopeSettings,
    MidtrainSettings,
    ModelShape,
    OptimizerSettings,
    PairsSettings,
    PretrainSettings,
    RewardModelSettings,
    SFTSettings,
    TokenizerSettings,
)
from polm.recipe_data import DataStage, DemoData
from polm.recipe_online import OnlineSettings, RejectionSettings
from polm.recipe_rl import PPOSettings, ReinforcePPSettings, ReMaxSettings, RLOOSettings
from polm.rewards import sources
from polm.rewards.verify import Verdict, VerifyItem
from polm.stages.common import Context
from polm.stages.table import STAGES
from polm.text.tokenizer import train_tokenizer

torch.set_num_threads(1)

DATA = DemoData(num_pretrain_docs=240, num_midtrain_docs=40, num_sft=24, num_prompts=16, num_items=1)
SHAPE = ModelShape(
    hidden_size=32, num_layers=1, num_heads=2, num_key_value_heads=1, intermediate_size=48, max_positions=192
)
MUON = OptimizerSettings(kind="muon", learning_rate=0.02, embedding_learning_rate=0.01)
LENGTH: dict[str, Any] = {"bin_tokens": 192, "precision": "fp32", "optimizer": MUON}
ROLLOUTS: dict[str, Any] = {**LENGTH, "prompts_per_rollout": 4, "samples": 4, "max_new_tokens": 8}
MIDTRAIN: dict[str, Any] = {**LENGTH, "updates": 6, "bins_per_update": 2}

Spec = tuple[str, Settings, Mapping[str, str]]
REMIT_INPUTS = {"base": "pretrain", "data": "data", "reference": "annotate"}
# Name -> (stage, settings, inputs by name): a flywheel turn in miniature.
ARTIFACTS: dict[str, Spec] = {
    "data": ("data", DataStage(data=DATA), {}),
    "tokenizer": ("tokenizer", TokenizerSettings(kind="word", vocab_size=200), {"data": "data"}),
    "pretrain": (
        "pretrain",
        PretrainSettings(**LENGTH, model=SHAPE, updates=12, bins_per_update=2),
        {"data": "data", "tokenizer": "tokenizer"},
    ),
    "midtrain": ("midtrain", MidtrainSettings(**MIDTRAIN), {"base": "pretrain", "data": "data"}),
    "sft": ("sft", SFTSettings(**LENGTH, epochs=1), {"base": "midtrain", "data": "data"}),
    "pairs": (
        "pairs",
        PairsSettings(num_prompts=12, samples=4, max_new_tokens=8, precision="fp32"),
        {"base": "sft", "data": "data"},
    ),
    "rejection": (
        "rejection",
        RejectionSettings(samples=4, max_new_tokens=24, temperature=1.5, precision="fp32"),
        {"base": "sft", "data": "data"},
    ),
    "online": (
        "online",
        OnlineSettings(**LENGTH, updates=3, prompts_per_rollout=6, samples=4, max_new_tokens=8),
        {"base": "sft", "data": "data"},
    ),
    "dpo": ("dpo", DPOSettings(**LENGTH, epochs=6), {"base": "sft", "data": "pairs"}),
    "reward_model": (
        "reward_model",
        RewardModelSettings(**LENGTH, epochs=12, bins_per_update=2, center_coefficient=0.01, holdout_share=0.3),
        {"base": "sft", "data": "pairs"},
    ),
    "grpo": (
        "grpo",
        GRPOSettings(
            **LENGTH, updates=4, updates_per_rollout=2, prompts_per_rollout=4, samples=4, max_new_tokens=8, kl_beta=0.01
        ),
        {"base": "dpo", "data": "data"},
    ),
    "rloo": (
        "rloo",
        RLOOSettings(**ROLLOUTS, updates=4, updates_per_rollout=2, kl_beta=0.05),
        {"base": "dpo", "data": "data"},
    ),
    "reinforce_pp": (
        "reinforce_pp",
        ReinforcePPSettings(**ROLLOUTS, updates=2, kl_beta=0.05, baseline="group", importance_cap=2.0),
        {"base": "dpo", "data": "data"},
    ),
    "remax": ("remax", ReMaxSettings(**ROLLOUTS, updates=2), {"base": "dpo", "data": "data"}),
    "ppo": (
        "ppo",
        PPOSettings(
            **ROLLOUTS,
            updates=8,
            epochs_per_rollout=2,
            minibatches=2,
            kl_target=0.5,
            kl_horizon=32,
            whiten_rewards=True,
            critic_optimizer=OptimizerSettings(learning_rate=0.01),
        ),
        {"base": "dpo", "data": "data"},
    ),
    "annotate": (
        "annotate",
        AnnotateSettings(top_k=4, max_tokens=192, precision="fp32"),
        {"model": "grpo", "data": "data"},
    ),
    "remit": ("midtrain", MidtrainSettings(**MIDTRAIN, weighting="remit", eps=0.8), REMIT_INPUTS),
    "shuffled": ("midtrain", MidtrainSettings(**MIDTRAIN, weighting="shuffled", eps=0.8), REMIT_INPUTS),
    "rho1": ("midtrain", MidtrainSettings(**MIDTRAIN, weighting="rho1", base="frozen"), REMIT_INPUTS),
    "distill": ("midtrain", MidtrainSettings(**MIDTRAIN, weighting="distill", top_k=4), REMIT_INPUTS),
    "plausible": ("midtrain", MidtrainSettings(**MIDTRAIN, weighting="plausible", floor=0.01), REMIT_INPUTS),
    "microscope": (
        "microscope",
        MicroscopeSettings(weighting="shuffled", bin_tokens=192, precision="fp32", max_tokens=400),
        {"base": "pretrain", "reference": "grpo", "data": "data"},
    ),
    "eval": (
        "eval",
        EvalSettings(samples=2, pass_k=(1, 2), max_new_tokens=8, precision="fp32"),
        {"model": "grpo", "data": "data"},
    ),
}


def judge_by_length(items: Iterable[VerifyItem], *, seconds: float = 3.0) -> list[Verdict]:
    """Stands in for the verifiers, as a model of a few thousand parameters is never right: an even number of
    characters is right, an odd one wrong."""
    del seconds
    return [Verdict("right" if len(item.completion) % 2 == 0 else "wrong", item.completion) for item in items]


@dataclass(frozen=True)
class Workshop:
    """Makes the artifacts of ARTIFACTS under `folder`, each once, its inputs first."""

    folder: Path

    def spec(self, name: str) -> Spec:
        return ARTIFACTS[name]

    def inputs(self, name: str) -> dict[str, str]:
        """Roles and folders of an artifact's inputs, made where they are not there yet."""
        return {role: str(self(source)) for role, source in ARTIFACTS[name][2].items()}

    def __call__(self, name: str) -> Path:
        out = self.folder / name
        if not (out / "manifest.json").is_file():
            stage, settings, _ = ARTIFACTS[name]
            self.run(stage, settings, self.inputs(name), out)
        return out

    def run(self, stage: str, settings: Settings, inputs: Mapping[str, str], out: Path) -> dict[str, Any]:
        """Run a stage through the store, answers judged by length; returns the manifest."""
        keys = {role: external_key(source) for role, source in inputs.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "verify_many", judge_by_length)
            work = Work(STAGES[stage], settings, inputs, keys, out)
            return execute(work, Context(out, inputs, say=lambda _: None))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """artifact("sft") is the folder of the tiny `sft` artifact, made on first use."""
    return Workshop(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder with a few dozen demo records in each file."""
    folder = tmp_path_factory.mktemp("data")
    build_demo_dataset(folder, **DATA.model_dump(exclude={"source"}))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the `polm` chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(read_documents(tiny_data / "pretrain.jsonl"), kind="word", vocab_size=200).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., PreTrainedModel]:
    """Builds a small random model on the token forest, far enough from uniform that an error would show."""
    return build_tiny_model


def build_tiny_model(vocab_size: int = 40, *, seed: int = 0, spread: float = 4.0, **changes: Any) -> PreTrainedModel:
    shape = {**SHAPE.model_dump(), "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2, **changes}
    model = build_model(**shape, vocab_size=vocab_size, seed=seed, eos_token_id=1, pad_token_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
    return model


@pytest.fixture(scope="session")
def hash_files() -> Callable[[Path], dict[str, str]]:
    """sha256 of each safetensors file below a folder, by its path."""

    def compute(folder: Path) -> dict[str, str]:
        files: Sequence[Path] = sorted(folder.rglob("*.safetensors"))
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return compute


@dataclass
class ChatServer:
    """An OpenAI-compatible server on this machine. `reply(body, number)` says what comes back to request `number` (of
    all, from 0): a text, a dictionary as it is, or (status, headers, raw bytes)."""

    reply: Callable[[dict[str, Any], int], Any]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any], headers: dict[str, str], path: str) -> tuple[int, dict[str, str], bytes]:
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self.paths.append(path)
        found = self.reply(body, number)
        if isinstance(found, tuple):
            return found
        if isinstance(found, str):
            found = {"choices": [{"message": {"role": "assistant", "content": found}, "finish_reason": "stop"}]}
        return 200, {}, json.dumps(found).encode()


@pytest.fixture
def chat_server() -> Iterator[Callable[..., ChatServer]]:
    """chat_server(reply) starts a server, which ends with the test."""
    running: list[http.server.ThreadingHTTPServer] = []

    def start(reply: Callable[[dict[str, Any], int], Any]) -> ChatServer:
        state = ChatServer(reply)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers, body = state.answer(json.loads(raw), dict(self.headers), self.path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has gone
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return state

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Every character is a token or a few: a judge's letters and digits are known to it."""
    folder = tmp_path_factory.mktemp("bytes")
    train_tokenizer(["a b"], kind="byte", vocab_size=300).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def other_model(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same layout with another tokenizer (words in another order)."""
    folder = tmp_path_factory.mktemp("other") / "model"
    texts = [text[::-1] for text in read_documents(tiny_data / "pretrain.jsonl")]
    tokenizer = train_tokenizer(texts, kind="word", vocab_size=200)
    save_model(build_tiny_model(len(tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def step_rows() -> list[dict[str, Any]]:
    """Answers in two or three steps, whose label says whether a step is right."""
    rows = []
    for i in range(24):
        good = [i % 3 != 0, i % 2 == 0, i % 5 != 0][: 2 + i % 2]
        steps = [f"{n} + {i} = {n + i + (not right)}" for n, right in enumerate(good)]
        rows.append({"prompt": f"add {i} and {i % 4} .", "completions": steps, "labels": good})
    return rows
