"""Scalar heads: the forest's values are those of plain `transformers`, in both layouts, and so are the gradients."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from polm.engine.optimizer import split_parameters
from polm.engine.score import score
from polm.errors import ModelError
from polm.models import heads, loading
from polm.models.heads import (
    Layout,
    build_scalar_model,
    find_scalar_head,
    load_scalar_model,
    prepare_scalar_model,
    read_layout,
)
from polm.models.loading import load_model, save_model
from polm.recipe import OptimizerSettings
from polm.tokens import Needs, build_completions, build_document, collate

Build = Callable[..., PreTrainedModel]
LAYOUTS: tuple[Layout, ...] = ("sequence", "token")
VALUES = Needs(values=True)
PROMPT, ANSWERS = [7, 3, 9], [[12, 30, 2, 5], [8, 8]]
WEIGHTS = "model.safetensors"


def batch_of_paths() -> Any:
    """A stranger, and a prompt with two answers: (batch, the two whole sequences, stream places of their tokens)."""
    batch = collate([build_document([4, 5, 6, 7]), build_completions(PROMPT, ANSWERS)])
    places = [[4, 5, 6, 7, 8, 9, 10], [4, 5, 6, 11, 12]]
    return batch, [PROMPT + answer for answer in ANSWERS], places


def run_plain(folder: Path, layout: Layout) -> PreTrainedModel:
    model: PreTrainedModel = heads.CLASSES[layout].from_pretrained(folder, attn_implementation="sdpa")
    return model.eval()


def pad_right(sequences: list[list[int]], pad: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_values_and_gradients_are_those_of_transformers(
    build_tiny: Build, tmp_path: Path, layout: Layout, num_labels: int, architecture: str
) -> None:
    base = build_tiny(40, architecture=architecture)
    model = build_scalar_model(base, layout, num_labels=num_labels, spread=1.0, seed=3)
    save_model(model, None, tmp_path / "model")
    assert read_layout(tmp_path / "model") == layout
    assert "forest" not in (tmp_path / "model" / "config.json").read_text()
    plain = run_plain(tmp_path / "model", layout)
    batch, sequences, places = batch_of_paths()
    ours = load_scalar_model(tmp_path / "model", num_labels=num_labels)
    values_TL = score(ours, batch, VALUES).values_TL
    assert values_TL is not None
    padded = pad_right(sequences, 0)
    theirs = plain(input_ids=padded, attention_mask=(padded != 0).long(), use_cache=False).logits
    if layout == "sequence":
        assert torch.equal(batch.ends_S[2:], torch.tensor([path[-1] for path in places]))
        found, expected = values_TL[batch.ends_S[2:]], theirs
    else:
        found = torch.cat([values_TL[path] for path in places])
        expected = torch.cat([row[: len(ids)] for row, ids in zip(theirs, sequences, strict=True)])
    assert float(expected.detach().abs().max()) > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * pull).sum().backward()
    (expected * pull).sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=2e-4)


def test_a_fresh_head_is_a_function_of_its_seed(build_tiny: Build) -> None:
    base = build_tiny(40)
    build = lambda **changes: find_scalar_head(build_scalar_model(base, "token", **changes))  # noqa: E731
    one, same, other, zero = build(seed=1), build(seed=1), build(seed=2), build(spread=0.0)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.weight.std().item() == pytest.approx((32 + 1) ** -0.5, rel=0.5)
    assert not zero.weight.any()
    assert not one.bias.any()


def test_the_base_stays_as_it_was(build_tiny: Build) -> None:
    base = build_tiny(40)
    before = copy.deepcopy(base.state_dict())
    model = build_scalar_model(base, "sequence")
    trunk = model.get_decoder().state_dict()
    assert all(torch.equal(p, trunk[name]) for name, p in base.get_decoder().state_dict().items())
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    assert base.config.num_labels == 2  # the default of transformers: the base's own config is not touched


def test_autocast_keeps_the_head_in_float32(build_tiny: Build) -> None:
    model = build_scalar_model(build_tiny(40), "sequence", spread=1.0)
    batch, _, _ = batch_of_paths()
    with torch.no_grad():
        exact, rough = (score(model, batch, VALUES, bf16=bf16).values_TL for bf16 in (False, True))
    assert exact is not None
    assert rough is not None
    assert rough.dtype == torch.float32
    assert rough.shape == (batch.num_tokens, 1)
    assert 0 < float((exact - rough).abs().max()) < 0.2


def test_muon_leaves_the_head_to_adamw(build_tiny: Build) -> None:
    model = build_scalar_model(build_tiny(40), "sequence")
    matrices, others = split_parameters(model, OptimizerSettings(kind="muon"))
    head = find_scalar_head(model)
    assert head is not None
    assert any(p is head.weight for p in others)
    assert not any(p is head.weight for p in matrices)
    assert len(matrices) + len(others) == len(list(model.parameters()))


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_models_and_objectives_that_do_not_fit(build_tiny: Build) -> None:
    base = build_tiny(40)
    model = build_scalar_model(base, "sequence")
    batch, _, _ = batch_of_paths()
    with pytest.raises(ModelError, match="gives values and no log-probabilities"):
        score(model, batch)
    with pytest.raises(ModelError, match="values were asked of a model without a head"):
        score(base, batch, VALUES)
    with pytest.raises(ModelError, match="cannot be had from one model"):
        score(model, batch, Needs(values=True, entropy=True))


def test_a_language_model_is_no_classifier(build_tiny: Build, tmp_path: Path) -> None:
    save_model(build_tiny(40), None, tmp_path / "model")
    assert read_layout(tmp_path / "model") is None
    with pytest.raises(ModelError, match=r"is a language model.*train a reward model from it first"):
        load_scalar_model(tmp_path / "model")


def test_another_number_of_labels(build_tiny: Build, tmp_path: Path) -> None:
    save_model(build_scalar_model(build_tiny(40), "token", num_labels=2), None, tmp_path / "model")
    with pytest.raises(ModelError, match="has 2 labels, and 1 are needed here"):
        load_scalar_model(tmp_path / "model", num_labels=1)


def damage_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda f: damage_weights(f, lambda t: t.pop("score.weight")), r"lacks 1 of its weights \(score.weight"),
    "a head that is no number": (
        lambda f: damage_weights(f, lambda t: t["score.weight"].fill_(float("nan"))),
        "has a head that is not finite",
    ),
    "a trunk that is no number": (
        lambda f: damage_weights(f, lambda t: t["model.norm.weight"].fill_(float("inf"))),
        "gives values that are not finite",
    ),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-60]), "could not be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in it"),
    "an unknown type": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "model_type": "nonsense"})
        ),
        "could not be loaded",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(build_tiny: Build, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    save_model(build_scalar_model(build_tiny(40), "sequence"), None, folder)
    load_scalar_model(folder)
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_scalar_model(folder)
    assert str(folder) in str(caught.value)


def test_an_architecture_without_the_class(build_tiny: Build) -> None:
    base = build_tiny(40, architecture="olmo2")
    with pytest.raises(ModelError, match=r"token classifier .* cannot be built.*Try the layout sequence"):
        build_scalar_model(base, "token")
    assert find_scalar_head(build_scalar_model(base, "sequence")) is not None


def test_the_check_sees_a_wrong_attention_behind_a_head_of_zeros(
    build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loading.build_plan
    base = build_tiny(40)

    def wrong(batch: Any, *more: int, **named: bool) -> Any:
        batch.layout.parents[1] = 0  # the second tree hangs below the first
        return real(batch, *more, **named)

    monkeypatch.setattr(loading, "build_plan", wrong)
    with pytest.raises(ModelError, match="other values as a token forest"):
        build_scalar_model(base, "sequence", spread=0.0)


def test_dropout_before_the_head_is_off(build_tiny: Build, tmp_path: Path) -> None:
    model = build_scalar_model(build_tiny(40), "token")
    model.config.classifier_dropout = 0.5
    save_model(model, None, tmp_path / "model")
    again = load_scalar_model(tmp_path / "model")
    assert again.training
    assert all(m.p == 0.0 for m in again.modules() if isinstance(m, torch.nn.Dropout))


def test_a_plain_classifier_becomes_ours(tiny_tokenizer: PreTrainedTokenizerFast, build_tiny: Build) -> None:
    """One that transformers has made, with its own starting weights."""
    del tiny_tokenizer
    config = copy.deepcopy(build_tiny(40).config)
    config.num_labels = 1
    for layout, kind in zip(
        LAYOUTS, (AutoModelForSequenceClassification, AutoModelForTokenClassification), strict=True
    ):
        plain = kind.from_config(config, attn_implementation="eager")
        ids = np.array([5, 6, 7, 8])
        with torch.no_grad():
            theirs = plain.eval()(input_ids=torch.tensor(ids)[None]).logits.reshape(-1)
            ours = score(prepare_scalar_model(plain, "x", layout), collate([build_document(ids)]), VALUES).values_TL
        assert ours is not None
        torch.testing.assert_close(ours[-len(theirs) :, 0], theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_classifier_is_no_language_model(build_tiny: Build, tmp_path: Path, tie: bool) -> None:
    save_model(build_scalar_model(build_tiny(40, tie_embeddings=tie), "sequence"), None, tmp_path / "model")
    with pytest.raises(ModelError, match="is a reward model or another classifier"):
        load_model(tmp_path / "model")
