"""The report in a real browser without a window: no request, no error, hostile text stays text, hovering and the
keyboard show numbers, filters filter, nothing is wider than a phone, both themes can be read.

The browser is driven over a pipe by its own protocol (DevTools), with the standard library alone. Without a chromium
or chrome on PATH the tests are skipped.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polm.report.html import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium or chrome on PATH")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
# The protocol uses the descriptors 3 and 4; whatever numbers the pipes have, they are moved there first.
LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
TIMEOUT = 60.0
# Counts what the tests must not see happen; hostile text tries to call alert.
WATCH = "window.fired = 0; window.alert = () => { window.fired += 1; };"


class Browser:
    """One page of a headless browser; `requests` and `problems` collect what it asked for and complained about."""

    def __init__(self, profile: Path) -> None:
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), BROWSER, *FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer = b""
        self.number = 0
        self.session: str | None = None
        self.loaded = False
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)

    def call(self, method: str, **params: Any) -> Any:
        """Send one command and wait for its answer; events in between are noted."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def receive(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self.read_end, 1 << 16)
            assert part, f"the browser has gone (exit code {self.process.poll()})"
            self.buffer += part
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self.note(message)
        return message

    def note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method", ""), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def open(self, page: Path, *, width: int = 1280, height: int = 900, theme: str = "light") -> None:
        """Load a file at a width (CSS pixels) in a theme, and forget what was collected before."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.requests, self.problems, self.loaded = [], [], False
        self.call("Page.navigate", url=page.as_uri())
        while not self.loaded:
            self.receive()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def hover(self, selector: str) -> None:
        """Move the pointer onto the middle of the first element that matches."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); "
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.write_end)
        os.close(self.read_end)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(small_run, tmp_path_factory.mktemp("page") / "report.html")


READOUT = "document.querySelector('.scope .readout').textContent"
VISIBLE = (
    "[...document.querySelector('.scope').querySelectorAll('.scoped')]"
    ".filter(e => e.offsetParent).map(e => e.dataset.label)"
)


def choose(browser: Browser, value: str) -> list[str]:
    """Pick a value of the first microscope's filter; the labels of the texts that are then to be seen."""
    browser.run(
        f"(() => {{ const s = document.querySelector('.scope select'); s.value = {json.dumps(value)}; "
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    shown: list[str] = browser.run(VISIBLE)
    return shown


def test_it_opens_and_asks_for_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.readyState") == "complete"
    assert browser.run("document.querySelectorAll('main section').length") > 8
    # Open every fold and use every control, so that what loads late would load.
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.run("document.querySelectorAll('button').forEach(b => b.click())")
    assert browser.requests == [page.as_uri()]
    assert browser.problems == []
    # The watch itself works: the policy stops a request, and the browser says so.
    browser.run("document.body.append(Object.assign(new Image(), {src: 'https://example.org/x.png'}))")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert any("example.org" in problem for problem in browser.problems)


def test_hovering_shows_a_tokens_numbers(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.querySelector('.scope .readout').hidden") is False
    browser.hover(".scoped i:nth-of-type(2)")
    title = browser.run("document.querySelector('.scoped i:nth-of-type(2)').title")
    assert title.startswith("log p_RL ")
    for part in ("log p_θ ", "delta ", "w "):
        assert part in title
    assert title in browser.run(READOUT)


def test_the_keyboard_walks_through_a_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('.scope select').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.matches('.scoped i:first-of-type')")
    assert "nothing predicts it" in browser.run(READOUT)
    browser.press("ArrowRight")
    assert browser.run("document.activeElement.matches('.scoped i:nth-of-type(2)')")
    assert browser.run("document.activeElement.title") in browser.run(READOUT)
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.run("document.activeElement.matches('.scoped i:first-of-type')")
    browser.press("Tab")  # to the next text, not through every token
    assert browser.run("document.activeElement.closest('.scoped') === document.querySelectorAll('.scoped')[1]")


def test_what_scrolls_can_be_reached_by_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, width=390, height=800)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.run("new Promise(done => setTimeout(done, 100))")
    out_of_reach = browser.run(
        "[...document.querySelectorAll('.scroll, .texts, pre')].filter(e => e.scrollWidth > e.clientWidth + 1 || "
        "e.scrollHeight > e.clientHeight + 1).filter(e => e.tabIndex < 0 && !e.querySelector('a, [tabindex]')).length"
    )
    assert browser.run("document.querySelectorAll('.scroll[tabindex]').length") > 0
    assert out_of_reach == 0


def test_shades_do_not_rest_on_colour(browser: Browser, page: Path) -> None:
    browser.open(page)
    style = lambda name: browser.run(  # noqa: E731
        f"getComputedStyle(document.querySelector('.legend .{name}')).textDecoration"
    )
    assert "underline" in style("u3")
    assert "dotted" not in style("u3")
    assert "dotted" in style("d3")


def test_the_filter_hides_other_sources(browser: Browser, page: Path) -> None:
    browser.open(page)
    labels = browser.run(VISIBLE)
    assert set(labels) == {"document:prose", "document:add/steps", "benchmark:add", "benchmark:sort"}
    assert set(choose(browser, "document:add/steps")) == {"document:add/steps"}
    assert set(choose(browser, "benchmark:sort")) == {"benchmark:sort"}
    assert choose(browser, "") == labels


def test_the_filter_of_outcomes(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('button[data-filter=fixed]').click()")
    shown = browser.run(
        "[...document.querySelectorAll('#samples .item')].filter(e => !e.hidden).map(e => e.dataset.outcome)"
    )
    assert set(shown) == {"fixed"}


def test_hostile_text_does_nothing(
    browser: Browser, build_run: Callable[..., Path], hostile: str, tmp_path: Path
) -> None:
    text = f'<script>alert(3)</script> {hostile} "><img src=x onerror=alert(4)> \u202eright to left\u2069'
    run_dir = build_run(text=text, benchmarks=(f"add{text}", "sort"), arms=(("remit", 0.1),))
    opened = write_report(run_dir, tmp_path / "report.html")
    browser.open(opened)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.hover(".scoped i:nth-of-type(2)")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run("window.fired") == 0
    assert browser.run("document.querySelectorAll('img, iframe, object, svg[onload]').length") == 0
    assert browser.run("document.scripts.length") == 1
    assert browser.requests == [opened.as_uri()]
    assert browser.problems == []
    # In every place it stands as text: tokens, tables, benchmarks, sources, the filter, model answers, rollouts.
    for place in (".scoped i", "#microscope td, #microscope th", "#benchmarks th", ".scoped h5", "option", "pre"):
        texts = browser.run(f"[...document.querySelectorAll('{place}')].map(e => e.textContent).join(' ')")
        assert "<script>alert(3)</script>" in texts, place
        assert "\u202e" not in texts, place
    assert "<script>alert(3)</script>" in browser.run("document.querySelector('#rollouts').textContent")
    # A hostile label is still a label: the filter finds its texts.
    labels = browser.run("[...document.querySelectorAll('.scope')[0].querySelectorAll('option')].map(e => e.value)")
    (label,) = [one for one in labels if one.startswith("document:add")]
    assert set(choose(browser, label)) == {label}


@pytest.mark.parametrize("name", ["pairs", "reward_model", "ppo", "eval"])
def test_the_report_of_one_stage(browser: Browser, artifact: Any, name: str, tmp_path: Path) -> None:
    opened = write_report(artifact(name), tmp_path / "report.html")
    browser.open(opened, width=390, height=800)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.run("document.querySelectorAll('button').forEach(b => b.click())")
    assert browser.requests == [opened.as_uri()]
    assert browser.problems == []
    assert browser.run("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll(browser: Browser, page: Path, theme: str) -> None:
    browser.open(page, width=390, height=800, theme=theme)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    width = browser.run("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
    assert max(width) == 390


CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; }
    return [255, 255, 255, 255];
  };
  const found = {};
  for (const selector of SELECTORS) for (const e of document.querySelectorAll(selector)) {
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    found[selector] = Math.min(found[selector] ?? 99, (a + 0.05) / (b + 0.05));
  }
  return found;
})()
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(browser: Browser, page: Path, theme: str) -> None:
    """Contrast by WCAG: 4.5 to 1 for text."""
    selectors = [
        "p",
        "h2",
        "td",
        "th",
        "pre",
        "a",
        ".quiet",
        ".verdict",
        "figcaption",
        ".readout",
        "summary",
    ]
    selectors += [f".legend .{side}{level}" for side in "ud" for level in (1, 2, 3)]
    browser.open(page, theme=theme)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = browser.run(CONTRAST.replace("SELECTORS", json.dumps(selectors)))
    assert set(found) == set(selectors)
    assert {name: round(ratio, 2) for name, ratio in found.items() if ratio < 4.5} == {}
    dark = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != dark  # the switch goes to the other theme
    found = browser.run(CONTRAST.replace("SELECTORS", json.dumps(selectors)))
    assert {name: round(ratio, 2) for name, ratio in found.items() if ratio < 4.5} == {}


def test_without_a_script_it_is_all_there(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    texts, controls, titles = browser.run(
        "[[...document.querySelectorAll('.scoped')].filter(e => !e.hidden).length, "
        "document.querySelector('.pick').checkVisibility(), document.querySelectorAll('.scoped i[title]').length]"
    )
    assert texts > 4
    assert not controls
    assert titles > 20


def test_it_prints(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.documentElement.dataset.theme = 'dark'")
    assert browser.run("getComputedStyle(document.body).colorScheme") == "dark"
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run("getComputedStyle(document.body).colorScheme") == "light"  # no sheets of black ink
    browser.call("Emulation.setEmulatedMedia", media="")
    done = browser.call("Page.printToPDF", printBackground=False, transferMode="ReturnAsStream")
    browser.call("Emulation.setEmulatedMedia", media="print")
    cut = "[...document.querySelectorAll('pre')].filter(e => e.scrollHeight > e.clientHeight + 1).length"
    assert browser.run(cut) == 0  # paper does not scroll
    browser.call("Emulation.setEmulatedMedia", media="")
    part = browser.call("IO.read", handle=done["stream"], size=8)
    assert part["data"].startswith("JVBER" if part.get("base64Encoded") else "%PDF-")
