"""The report of a run as one self-contained HTML file.

The page needs nothing but itself: style and script are inline and allowed by their hashes, and its content security
policy forbids everything else, so that no text in it could reach the network even if it got past the escaping. Without
a script the theme switch, the filters and the microscope's line of numbers are missing (hovering still shows them).
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from polm import __version__
from polm.errors import StoreError
from polm.report.escape import esc
from polm.report.load import Run, load_report
from polm.report.rounds import compute_rounds
from polm.report.sections_judges import section_judges
from polm.report.sections_made import section_answers, section_revisions, section_reward_models
from polm.report.sections_microscope import section_microscope
from polm.report.sections_problems import section_problems
from polm.report.sections_provenance import section_ledger, section_lineage, section_recipe, section_versions
from polm.report.sections_results import build_tiles, section_benchmarks, section_graph, section_headline
from polm.report.sections_rollouts import section_rollouts
from polm.report.sections_samples import section_samples
from polm.report.sections_stage import build_rounds_headline, section_stage
from polm.report.sections_training import section_training


def build_headline(run: Run) -> str:
    """The headline by what the folder holds: one stage, rounds without a control, or arms beside one."""
    if run.is_stage:
        return section_stage(run)
    rounds = compute_rounds(run)
    return section_headline(run) if rounds is None else build_rounds_headline(rounds) + build_tiles(run)


# (anchor, heading, builder), in the order of the page; a section that has nothing to say returns nothing.
SECTIONS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("headline", "Headline", build_headline),
    ("graph", "Graph of stages", section_graph),
    ("benchmarks", "Benchmarks", section_benchmarks),
    ("training", "Training curves", section_training),
    ("microscope", "Token microscope", section_microscope),
    ("samples", "Samples", section_samples),
    ("rollouts", "Rollouts", section_rollouts),
    ("reward-models", "Reward models", section_reward_models),
    ("answers", "Answers that became data", section_answers),
    ("judges", "Judges", section_judges),
    ("revisions", "Revisions", section_revisions),
    ("problems", "What was left out", section_problems),
    ("ledger", "Token ledger", section_ledger),
    ("lineage", "Lineage", section_lineage),
    ("recipe", "Recipe", section_recipe),
    ("versions", "Versions", section_versions),
)


def _read_asset(name: str) -> str:
    return resources.files("polm.report").joinpath(name).read_text(encoding="utf-8").strip()


def _compute_source(text: str) -> str:
    """The source expression of a content security policy that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def build_report(run: Run) -> str:
    """The whole page as text. The same run folder gives the same bytes: nothing of the present time is written."""
    title = "polm report" if not run.is_stage else f"polm {run.nodes[0].spec.stage}"
    finished = max((node.manifest.finished for node in run.nodes if node.manifest), default="")
    when = f"last stage finished {finished}" if finished else "no stage finished yet"
    sections = [(anchor, heading, html) for anchor, heading, build in SECTIONS if (html := build(run))]
    return build_page(title, run.name, when, sections)


def build_page(kind: str, name: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A self-contained page. `sections` are (anchor, heading, safe HTML); all other text is escaped here."""
    style, script = _read_asset("report.css"), _read_asset("report.js")
    policy = (
        f"default-src 'none'; style-src {_compute_source(style)}; script-src {_compute_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{anchor}">{esc(heading)}</a></li>' for anchor, heading, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{esc(heading)}</h2>{content_html}</section>'
        for anchor, heading, content_html in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(name)} · {esc(kind)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header class="top"><p class="eyebrow">{esc(kind)}</p><h1>{esc(name)}</h1><p class="quiet">{esc(lead)}</p></header>
<nav aria-label="Sections"><ul>{links}</ul><button type="button" id="theme" hidden>light / dark</button></nav>
<main id="main">
{body}
</main>
<footer class="quiet">Written by polm {esc(__version__)}. Model text on this page is shown as text only.</footer>
<script>{script}</script>
</body>
</html>
"""


def write_report(run_dir: Path, out: Path) -> Path:
    """Write the report of the folder `run_dir`, a run or one finished stage, to the file `out` and return it.

    Raises StoreError if `run_dir` is neither, if a file in it is damaged, or if `out` cannot be written.
    """
    return write_page(build_report(load_report(run_dir)), out)


def write_page(page: str, out: Path) -> Path:
    """Write a text to the file `out`, which appears whole or not at all. Raises StoreError if it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise StoreError(
            f"{out}: cannot be written ({error.strerror}); name a file in a folder you may write to"
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(page.encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes the file private; a report is as readable as any other file of its owner.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(out)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"{out}: cannot be written ({error.strerror}); name a file, not a folder") from error
    return out
