"""The token microscope and the rollouts: shades, numbers in words, caps that are stated, damaged files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from polm.errors import StoreError
from polm.report import sections_microscope
from polm.report.load import RolloutGroup, RolloutSample, TokenTables, load_run
from polm.report.sections_microscope import (
    choose_nodes,
    compute_level,
    describe_numbers,
    section_microscope,
    show_token,
    spell_entry,
)
from polm.report.sections_rollouts import _build_group, choose_node, section_rollouts

TABLES = TokenTables("remit", 0.8, 1, 1, 1, 0.0, 1.0, [], [], [], [])


def test_shades() -> None:
    """By the share of the farthest a weight may go from 1: from a tenth, a third, two thirds on."""
    weights = (0.2, 0.5, 0.7, 0.95, 1.0, 1.05, 1.2, 1.5, 1.8)
    assert [compute_level(0.0, w, TABLES) for w in weights] == [-3, -2, -2, 0, 0, 0, 1, 2, 3]
    narrow = replace(TABLES, eps=0.2)
    assert [compute_level(0.0, w, narrow) for w in (0.8, 1.1, 1.2)] == [-3, 2, 3]
    selection = replace(TABLES, weighting="rho1")
    assert [compute_level(0.0, w, selection) for w in (0.0, 1.0)] == [-3, 2]
    assert [compute_level(d, None, TABLES) for d in (-5.0, -1.0, -0.1, 0.4, 1.5)] == [-3, -2, 0, 1, 2]
    assert compute_level(1.0, 1.0, replace(TABLES, eps=0.0)) == 0


@pytest.mark.parametrize("weighting", ["plausible", "shuffled"])
def test_shades_of_plausible_weights(weighting: str) -> None:
    """They lie in 0..1 whatever ReMiT's eps is, and nothing is lifted."""
    tables = replace(TABLES, weighting=weighting, shuffles="plausible", eps=0.2)
    weights = (0.0, 0.3, 0.5, 0.6, 0.8, 0.95, 1.0)
    assert [compute_level(0.0, w, tables) for w in weights] == [-3, -3, -2, -2, -1, 0, 0]
    assert compute_level(0.0, 1.2, replace(tables, weighting="shuffled", shuffles="remit")) == 3


def test_weightings_in_words(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    files = [
        run_dir / node["artifact"] / "tokens.json"
        for node in json.loads((run_dir / "run.json").read_text())["nodes"]
        if node["stage"] == "microscope"
    ]
    for file, weighting in zip(files, ("plausible", "shuffled"), strict=True):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"weighting": weighting, "shuffles": "plausible"}))
    page = section_microscope(load_run(run_dir))
    assert "a token is damped or left as it is, never lifted" in page
    assert "The control: the weights of plausible, dealt out to the tokens at random" in page
    assert page.count("least damped, by mean weight") == 2
    assert (
        page.count("All near one: the reference would have written every token") == 4
    )  # each twice: also as alternative
    assert "ReMiT" not in page
    # A file of the stage's first version does not say whose weights they are.
    old = json.loads(files[1].read_text())
    del old["shuffles"]
    files[1].write_text(json.dumps(old))
    assert "ReMiT&#x27;s weights, dealt out" in section_microscope(load_run(run_dir))


def test_numbers_in_words() -> None:
    assert describe_numbers(-1.25, -2.5, 1.25, 1.4) == "log p_RL −1.25 · log p_θ −2.50 · delta +1.25 · w 1.40"
    assert describe_numbers(-2.5, -1.0, -1.5, None) == "log p_RL −2.50 · log p_θ −1.00 · delta −1.50"
    assert describe_numbers(None, None, None, None) == "the first token: nothing predicts it"


def test_tokens_are_shown_as_text() -> None:
    assert show_token("<b>") == "&lt;b&gt;"
    assert show_token("\n") == "⏎\n"
    assert show_token("") == "·"
    assert len(show_token("x" * 500)) == 60
    assert "\u202e" not in show_token("\u202eabc")
    assert spell_entry("\uffed4 ") == "▪4␣"


def test_the_section(small_run: Path) -> None:
    run = load_run(small_run)
    assert [(node.spec.arm, node.spec.seed) for node in choose_nodes(run)] == [("remit", 0), ("rho1", 0)]
    page = section_microscope(run)
    assert page.count('class="scope"') == 2
    assert page.count('<article class="scoped"') == 16
    assert page.count('class="cut"') == 8  # where the solution of a benchmark begins
    assert "2 more tokens" in page
    assert '<option value="benchmark:sort">sort</option>' in page
    assert "most lifted, by mean weight" in page
    assert "Over 24 tokens of 4 mid-training documents" in page
    titles = re.findall(r'<i[^>]* title="([^"]*)"', page)
    assert len(titles) == 16 * 7
    assert sum("nothing predicts it" in title for title in titles) == 16


def test_caps_are_stated(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections_microscope, "MAX_TEXTS", 3)
    monkeypatch.setattr(sections_microscope, "MAX_SCOPES", 1)
    page = section_microscope(load_run(small_run))
    assert page.count('<article class="scoped"') == 3
    assert "3 texts; 5 more are in the artifact but not here (3 texts or 12000 tokens)" in page
    assert "Not shown here, to keep the page small: rho1 · cycle 1." in page
    monkeypatch.setattr(sections_microscope, "MAX_TOKENS", 10)
    page = section_microscope(load_run(small_run))
    assert page.count('<article class="scoped"') == 2
    assert "… 6 more tokens" in page  # of nine, seven are in the artifact and three within the cap


def test_without_any(build_run: Callable[..., Path]) -> None:
    run = load_run(build_run(arms=()))
    assert section_microscope(run) == ""  # nor will it have one
    assert choose_node(run) is not None  # the control has rollouts of its own


def test_damaged_files(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    file = next((run_dir / "store").glob("microscope-*")) / "microscope.jsonl"
    rows = [json.loads(raw) for raw in file.read_text().splitlines()]
    rows[1]["delta"].pop()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StoreError, match=r"microscope.jsonl:2: .*as long as the list of tokens"):
        load_run(run_dir)
    assert load_run(run_dir, with_details=False).nodes


def test_rollouts(small_run: Path) -> None:
    page = section_rollouts(load_run(small_run))
    assert "Training rollouts of remit · cycle 1, seed 0" in page
    assert "First rollout, update 1: 2 prompts" in page
    assert "Last rollout, update 40: 2 prompts" in page
    assert "update 20" not in page
    assert page.count("✓ right, reward 1, advantage +1.00") == 4
    assert page.count("✗ wrong, reward 0, advantage 0<") == 4
    assert page.count("? unparsed, reward 0, advantage −1.00") == 4
    assert "1 of 4 right" in page


def test_a_run_under_way_has_rollouts(build_run: Callable[..., Path]) -> None:
    """A torn last line is left out, as in every log."""
    run_dir = build_run(arms=())
    folder = next((run_dir / "store").glob("grpo-*"))
    (folder / "manifest.json").unlink()
    with (folder / "samples.jsonl").open("a") as handle:
        handle.write('{"update": 41, "pro')
    node = choose_node(load_run(run_dir))
    assert node is not None
    assert len(node.rollouts) == 5


def test_rewards_that_are_no_verdicts() -> None:
    """A judge's grade, an answer that it said nothing about, and a prompt without a known answer."""
    samples = [
        RolloutSample("a", "scored", 0.5, reward=-0.35),
        RolloutSample("b", "nonsense"),
        RolloutSample("c", "wrong", -0.5, reward=0.1),
        RolloutSample("d", "right", 1.0),
        RolloutSample("e", "timeout", note="<b>took longer than 3 s</b>"),
    ]
    page = _build_group(RolloutGroup(1, "p", "", samples))
    assert page.count('class="verdict wrong"') == page.count('class="verdict right"') == 1
    assert "&lt;b&gt;took longer than 3 s" in page
    text = re.sub(r"<[^>]+>", " ", page)
    for words in (
        "scored, reward \u22120.35, advantage +0.50",
        "nonsense, no reward ",
        "? timeout, no reward ",
        "wrong, reward 0.1",
    ):
        assert words in text
    assert "right, reward 1, advantage +1.00" in text
    assert "no known answer" in text
    assert "expected answer: <code>7</code>; 1 of 5 right" in _build_group(RolloutGroup(1, "p", 7.0, samples)).replace(
        "7.0", "7"
    )
