"""The page as a whole: one file, no request, no text that acts, the right words for null results and for one seed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polm.errors import StoreError
from polm.report.html import SECTIONS, build_report, write_report
from polm.report.load import Item, load_run
from polm.report.sections_samples import build_answer

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and ids; checks that what is opened is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def small_page(small_run: Path) -> str:
    return build_report(load_run(small_run))


def test_page_is_well_formed_and_has_every_section(small_page: str) -> None:
    parser = parse(small_page)
    ids = [value for _, name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    not_here = {"judges", "reward-models", "revisions", "answers"}  # no such stages, or no files of theirs
    assert {anchor for anchor, _, _ in SECTIONS} - not_here <= set(ids)
    assert not not_here & set(ids)
    links = {value[1:] for tag, name, value in parser.attributes if tag == "a" and name == "href"}
    assert links <= set(ids)


def test_page_asks_for_nothing(small_page: str) -> None:
    parser = parse(small_page)
    assert not set(parser.tags) & {"img", "link", "iframe", "object", "embed", "video", "audio", "base", "form"}
    for tag, name, value in parser.attributes:
        assert name not in ("src", "srcset", "style", "action", "data", "xlink:href"), (tag, name)
        assert not name.startswith("on"), (tag, name)
        if name == "href":
            assert value.startswith("#")
    assert "@import" not in small_page
    assert "url(http" not in small_page
    assert "//" not in re.sub(r"(?s)<script>.*?</script>", "", small_page)  # no address of any scheme


def test_policy_allows_exactly_the_inline_style_and_script(small_page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', small_page)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none';")
    assert "unsafe" not in policy.group(1)
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", small_page, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy.group(1)


def test_hostile_text_everywhere_stays_text(build_run: Callable[..., Path], hostile: str) -> None:
    run_dir = build_run(text=hostile, name=hostile, benchmarks=(f"add{hostile}", "sort"), arms=((f"r{hostile}", 0.1),))
    content = json.loads((run_dir / "run.json").read_text())
    content["versions"][hostile] = hostile
    content["headline"] = {hostile: hostile}
    for node in content["nodes"]:
        node["inputs"][hostile] = hostile
    (run_dir / "run.json").write_text(json.dumps(content))
    for manifest_file in (run_dir / "store").glob("*/manifest.json"):
        manifest = json.loads(manifest_file.read_text())
        manifest["ledger"] = {hostile: 1}
        manifest["finished"] = manifest["key"] = hostile
        manifest_file.write_text(json.dumps(manifest))
    for metrics_file in (run_dir / "store").glob("midtrain-*/metrics.jsonl"):
        metrics_file.write_text(metrics_file.read_text().replace("remit/mean", "remit/<img src=x onerror=a>mean"))
    for items_file in (run_dir / "store").glob("*/items.jsonl"):
        lines = [{**json.loads(line), "greedy_status": hostile, "answer": hostile} for line in items_file.open()]
        items_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build_report(load_run(run_dir))
    parser = parse(page)
    assert parser.tags.count("script") == 1
    assert "img" not in parser.tags
    assert not [name for _, name, _ in parser.attributes if name.startswith("on")]
    assert not [character for character in page if ord(character) < 32 and character not in "\n\t"]
    assert "\u202e" not in page
    assert "\u2066" not in page
    text = "".join(parser.text)
    assert "</script><img src=x onerror=alert(1)>\"'`&lt; ⟨U+202E⟩desrever⟨U+2066⟩ ⟨U+0000⟩⟨U+001B⟩[31mred" in text


@pytest.mark.parametrize(
    ("kept", "words", "difference"),
    [
        ({"base": 1, "sft": 1, "dpo": 1, "rl": 1}, "of the score over items.", "Over items only: one seed"),
        ({"base": 3, "sft": 1, "dpo": 2, "rl": 1}, "over 1 to 3 seeds (with one seed over items).", "Over items only"),
        ({"base": 3, "sft": 3, "dpo": 3, "rl": 3}, "of the score over 3 seeds.", ""),
    ],
)
def test_captions_count_the_seeds_that_were_evaluated(
    build_run: Callable[..., Path], kept: dict[str, int], words: str, difference: str
) -> None:
    """Three seeds are planned; of each point the first few have been evaluated."""
    run_dir = build_run(seeds=3)
    for node in json.loads((run_dir / "run.json").read_text())["nodes"]:
        point = node["id"].rsplit("/", 1)[-1].removeprefix("eval_")
        if node["stage"] == "eval" and node["seed"] >= kept[point]:
            shutil.rmtree(run_dir / node["artifact"])
    text = "".join(parse(build_report(load_run(run_dir))).text)
    assert text.count(words) == 2  # greedy and sampled
    assert ("The bootstrap draws" in text) == (min(kept.values()) == 1)
    after_rl = text[text.index("After RL: greedy") :]
    reading = after_rl[: after_rl.index("Right is better.") + 60]
    assert ("Over items only" in reading) == (kept["rl"] == 1)
    assert difference in text
    base = text[text.index("Base model, after mid-training: greedy") :]
    assert ("Over items only" in base[: base.index("Right is better.") + 60]) == (kept["base"] == 1)


def test_arms_with_other_numbers_of_seeds_are_told_apart(build_run: Callable[..., Path]) -> None:
    run_dir = build_run(seeds=3)
    for node in json.loads((run_dir / "run.json").read_text())["nodes"]:
        if node["stage"] == "eval" and node["arm"] == "rho1" and node["seed"] > 0:
            shutil.rmtree(run_dir / node["artifact"])
    text = "".join(parse(build_report(load_run(run_dir))).text)
    assert "Over 1 to 3 seeds, with one seed over items only: one seed proves nothing" in text


def test_an_answer_without_a_verdict_is_not_called_wrong() -> None:
    item = Item("addition", 1, "2 + 2 =", "4", "a timeout", "timeout", 0.0)
    section = build_answer(item, "after")
    assert "no verdict: timeout" in section
    assert "wrong" not in section
    assert "✗ wrong" in build_answer(replace(item, greedy_status="wrong"), "after")


def test_one_seed_is_no_result(build_run: Callable[..., Path]) -> None:
    text = "".join(parse(build_report(load_run(build_run(arms=(("remit", 0.4),))))).text)
    claim = text[text.index("remit · cycle 1 against ntp:") :][:120]
    assert "One seed, so nothing is shown." in claim
    assert "One seed proves nothing about training noise" in text
    assert "The arm is better" not in text
    assert "▲ +" not in text


def test_a_null_result_reads_as_one(build_run: Callable[..., Path]) -> None:
    text = "".join(parse(build_report(load_run(build_run(seeds=2, arms=(("remit", 0.0),))))).text)
    assert "No difference was shown." in text[text.index("remit · cycle 1 against ntp:") :][:150]
    assert "No difference was shown: the interval includes zero." in text


def test_an_effect_over_seeds_is_named_with_its_interval(build_run: Callable[..., Path]) -> None:
    run_dir = build_run(seeds=3, arms=(("remit", 0.3),), num_items=60)
    text = "".join(parse(build_report(load_run(run_dir))).text)
    assert "Better as a base model, better after RL." in text
    assert re.search(
        r"remit · cycle 1 against ntp: \+[\d.]+ points \(95 % interval \+[\d.]+ to \+[\d.]+; t interval", text
    )


def test_an_unfinished_run_has_a_report(build_run: Callable[..., Path]) -> None:
    text = "".join(parse(build_report(load_run(build_run(until="midtrain")))).text)
    assert "6 evaluations are pending" in text
    assert "20 of 34" in text


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    nodes = [{"id": "s0/data", "stage": "data", "key": "", "artifact": "store/data-1", "seed": 0}]
    (tmp_path / "run.json").write_text(json.dumps({"name": "new", "nodes": nodes}))
    text = "".join(parse(build_report(load_run(tmp_path))).text)
    assert "Nothing to compare yet: 0 of 1 stages are done." in text
    assert "This run has no evaluations." in text


def test_ledger_and_lineage(small_page: str) -> None:
    text = "".join(parse(small_page).text)
    ledger = text[text.index("How to read: a row is one count") :]
    assert ledger.index("tokens read") < ledger.index("tokens lost") < ledger.index("tokens kept")
    assert "240\u202f000" in ledger
    assert 'href="#node-0"><code>s0/data</code>' in small_page


def test_report_is_written_whole_and_the_same_each_time(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    assert write_report(small_run, out) == out
    first = out.read_bytes()
    write_report(small_run, out)
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert stat.S_IMODE(out.stat().st_mode) & 0o400


def test_a_failure_leaves_the_old_report(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(StoreError):
        write_report(tmp_path / "no-run", out)
    assert out.read_text() == "old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="name a file, not a folder"):
        write_report(small_run, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "report.html"]
