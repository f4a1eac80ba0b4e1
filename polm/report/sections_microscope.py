"""The token microscope: texts whose tokens are shaded by their weight, and the tokens most lifted and most damped.

A lifted token is underlined, a damped one dotted, so that the colours only repeat what the lines say.
"""

from __future__ import annotations

from collections.abc import Sequence

from polm.recipe import is_plausible
from polm.report.compare import compute_arm, compute_rows, get_lead_arm
from polm.report.escape import clean_text, esc
from polm.report.load import Microscope, Node, Run, ScopedText, TokenMean, TokenTables
from polm.report.markup import (
    Cell,
    build_details,
    build_grid,
    build_paragraph,
    build_table,
    compute_arm_styles,
    number_cell,
    text_cell,
)
from polm.report.plots import Bar, build_bar_plot, compute_histogram_edges

MAX_SCOPES = 4  # arms and cycles that are shown with their texts
MAX_TEXTS = 80  # texts of each
MAX_TOKENS = 12_000  # tokens of each
MAX_TOKEN_LENGTH = 60  # characters of one token
WEIGHT_RANGE = (0.0, 2.0)
LEVELS = (0.1, 1 / 3, 2 / 3)  # shades: from which share of the largest possible effect on
JOINER = "\uffed"  # in a `word` tokenizer's vocabulary: this piece touches its neighbour
MINUS = "\u2212"


def choose_nodes(run: Run) -> list[Node]:
    """One microscope for each arm and cycle (its first finished seed), the lead arm first, earlier cycles first."""
    found: dict[object, Node] = {}
    for node in sorted(run.nodes, key=lambda node: node.spec.seed or 0):
        if node.microscope is not None and node.status != "shared":
            found.setdefault(compute_arm(node), node)
    lead = get_lead_arm(compute_rows(run))
    return sorted(
        found.values(),
        key=lambda node: (lead is None or node.spec.arm != lead.name, str(node.spec.arm), node.spec.cycle or 0),
    )


def compute_level(delta: float, weight: float | None, tables: TokenTables) -> int:
    """-3 (damped) to 3 (lifted). A weight counts against the farthest it may go from 1; a bare delta against 3 nats.

    ReMiT's go to 1 ± eps, those of `plausible` down to 0 and never above 1.
    """
    if weight is None:
        effect = delta / 3.0
    elif tables.weighting == "rho1":
        effect = 0.5 if weight else -1.0
    elif is_plausible(tables.weighting, tables.shuffles):
        effect = weight - 1.0
    else:
        effect = (weight - 1.0) / (tables.eps or 1.0)
    level = sum(abs(effect) >= limit for limit in LEVELS)
    return level if effect > 0 else -level


def format_signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def describe_numbers(reference: float | None, base: float | None, delta: float | None, weight: float | None) -> str:
    """The numbers of one token in words, as hovering and the line of numbers show them."""
    if reference is None or base is None or delta is None:
        return "the first token: nothing predicts it"
    words = f"log p_RL {reference:.2f} · log p_θ {base:.2f} · delta {format_signed(delta)}".replace(" -", f" {MINUS}")
    return words if weight is None else f"{words} · w {weight:.2f}"


def show_token(token: str) -> str:
    """A token as safe HTML: line ends visible, nothing empty, nothing endless."""
    text = clean_text(token)
    if len(text) > MAX_TOKEN_LENGTH:
        text = text[: MAX_TOKEN_LENGTH - 1] + "…"
    return esc(text).replace("\n", "⏎\n") or "·"


def build_tokens(text: ScopedText, tables: TokenTables, limit: int) -> str:
    """The tokens of a text as shaded pieces; a bar stands where a benchmark's solution begins."""
    weights = text.weight if text.weight is not None else [None] * len(text.tokens)
    parts = []
    columns = zip(text.tokens, text.logp_ref, text.logp_base, text.delta, weights, strict=True)
    for number, (token, reference, base, delta, weight) in enumerate(columns):
        if number >= limit:
            break
        if number and number == text.num_prompt:
            parts.append('<b class="cut" title="the solution begins here"> │ </b>')
        level = 0 if delta is None else compute_level(delta, weight, tables)
        kind = f' class="{"u" if level > 0 else "d"}{abs(level)}"' if level else ""
        parts.append(
            f'<i{kind} title="{esc(describe_numbers(reference, base, delta, weight))}">{show_token(token)}</i>'
        )
    shown = min(limit, len(text.tokens))
    more = f'<span class="quiet"> … {text.num_tokens - shown} more tokens</span>' if text.num_tokens > shown else ""
    return f'<p class="tokens">{"".join(parts)}{more}</p>'


def _build_texts(scope: Microscope) -> str:
    """All texts within the caps, and the filter over their labels."""
    articles, left = [], MAX_TOKENS
    for text in scope.texts[:MAX_TEXTS]:
        if left <= 0:
            break
        what = "document of" if text.kind == "document" else "benchmark"
        articles.append(
            f'<article class="scoped" data-label="{esc(f"{text.kind}:{text.label}")}"><h5>{what} '
            f"<code>{esc(text.label)}</code>, {esc(text.id)}</h5>{build_tokens(text, scope.tables, left)}</article>"
        )
        left -= len(text.tokens)
    shown = scope.texts[: len(articles)]
    groups = []
    for kind, words in (("document", "document sources"), ("benchmark", "benchmarks")):
        labels = sorted({text.label for text in shown if text.kind == kind})
        options = "".join(f'<option value="{esc(f"{kind}:{label}")}">{esc(label)}</option>' for label in labels)
        groups.append(f'<optgroup label="{words}">{options}</optgroup>' if options else "")
    select = f'<label class="pick" hidden>show <select><option value="">all</option>{"".join(groups)}</select></label>'
    hidden = len(scope.texts) - len(articles)
    cap = (
        f"; {hidden} more are in the artifact but not here ({MAX_TEXTS} texts or {MAX_TOKENS} tokens)" if hidden else ""
    )
    count = f'<p class="quiet">{len(articles)} texts{cap}. The first token of a text has no weight.</p>'
    return f'{select}{count}<div class="texts">{"".join(articles)}</div>'


def _mean_cells(one: TokenMean) -> list[Cell]:
    weight = Cell("–" if one.weight is None else f"{one.weight:.3f}", "num")
    return [number_cell(one.count), weight, Cell(format_signed(one.delta), "num")]


def spell_entry(token: str) -> str:
    """An entry of the vocabulary with its spaces and its joiners (which few fonts have) made visible."""
    return token.replace(" ", "␣").replace(JOINER, "▪")


def _build_token_table(rows: Sequence[TokenMean], caption: str) -> str:
    body = [[Cell(f"<code>{show_token(spell_entry(one.token))}</code>"), *_mean_cells(one)] for one in rows]
    return build_table(["token", ">count", ">mean w", ">mean delta"], body, caption=caption)


def _build_tables(run: Run, node: Node, tables: TokenTables) -> str:
    by = "mean delta" if tables.mean_weight is None else "mean weight"
    highest = "least damped" if is_plausible(tables.weighting, tables.shuffles) else "most lifted"
    pair = build_grid(
        [
            _build_token_table(tables.lifted, f"{highest}, by {by}"),
            _build_token_table(tables.damped, f"most damped, by {by}"),
        ]
    )
    sources = sorted(tables.sources, key=lambda one: -(one.delta if one.weight is None else one.weight))
    rows = [[text_cell(one.source), *_mean_cells(one)] for one in sources]
    by_source = build_table(["source", ">tokens", ">mean w", ">mean delta"], rows)
    note = build_paragraph(
        f"Over {tables.num_tokens} tokens of {tables.num_documents} mid-training documents drawn by the seed; a token "
        f"stands in a table if it occurs at least {tables.min_count} times. ␣ is a space, ▪ marks a piece that touches "
        "its neighbour without one.",
        "quiet",
    )
    parts = [note, pair, build_details(f"By source of the documents ({len(rows)})", by_source)]
    if sum(tables.histogram):
        parts.append(build_grid([_build_histogram(run, node, tables)]))
    return "".join(parts)


def _build_histogram(run: Run, node: Node, tables: TokenTables) -> str:
    edges = compute_histogram_edges(*WEIGHT_RANGE, len(tables.histogram))
    total = sum(tables.histogram)
    series = compute_arm_styles(run).get(compute_arm(node), (5, 0))[0]
    at_one, at_ends = "says nothing new", "piled up at both ends: they are clipped"
    if is_plausible(tables.weighting, tables.shuffles):
        at_one, at_ends = "would have written every token", "near nought: it was sure of other tokens"
    bars = [
        Bar(f"{edges[i]:.3g} to {edges[i + 1]:.3g}", count / total, series) for i, count in enumerate(tables.histogram)
    ]
    return build_bar_plot(
        bars,
        title=f"{compute_arm(node).label}: weights at the first update",
        x_label="token weight w",
        y_label="share of tokens",
        edges=edges,
        how_to_read=(
            f"Where the weights of the sample lie before mid-training. All near one: the reference {at_one}; {at_ends}."
        ),
    )


def _describe_weighting(tables: TokenTables) -> str:
    whose = "the weights of plausible" if is_plausible(tables.weighting, tables.shuffles) else "ReMiT's weights"
    words = {
        "remit": f"w is ReMiT's weight, clipped to 1 ± {tables.eps:g}.",
        "plausible": (
            "w is 1 where the token is the reference's own best, and falls as the token is less likely than that one, "
            "down to 0: a token is damped or left as it is, never lifted, and delta plays no part in it."
        ),
        "shuffled": f"The control: {whose}, dealt out to the tokens at random, so their places mean nothing.",
        "rho1": "w is 1 where the loss keeps the token and 0 where it leaves it out.",
        "distill": "Distillation weights no token: the shades show delta (three shades: 0.3, 1 and 2 nats).",
    }
    return words.get(tables.weighting, f"The weighting is {tables.weighting}.")


def _build_scope(run: Run, node: Node, *, is_open: bool) -> str:
    assert node.microscope is not None
    tables = node.microscope.tables
    mean = "" if tables.mean_weight is None else f", mean weight {tables.mean_weight:.3f}"
    summary = f"{compute_arm(node).label}, seed {node.spec.seed}: {tables.weighting}{mean}"
    body = (
        f"<p>{esc(_describe_weighting(tables))}</p>{_build_texts(node.microscope)}"
        '<p class="readout" role="status" hidden>Point at a token, or go through a text with the arrow keys.</p>'
    )
    return build_details(summary, f'<div class="scope">{body}</div>{_build_tables(run, node, tables)}', is_open=is_open)


def section_microscope(run: Run) -> str:
    """What each arm's reference lifts and damps, token by token."""
    nodes = choose_nodes(run)
    if not nodes:
        is_to_come = any(node.spec.stage == "microscope" for node in run.nodes)
        return build_paragraph("No arm with a reference has got this far yet.", "callout") if is_to_come else ""
    legend = (
        '<ul class="legend tokens"><li><i class="u3">much lifted</i></li><li><i class="u2">lifted</i></li>'
        '<li><i class="u1">a little lifted</i></li><li><i>near one</i></li><li><i class="d1">a little damped</i></li>'
        '<li><i class="d2">damped</i></li><li><i class="d3">much damped</i></li></ul>'
    )
    parts = [
        build_paragraph(
            "How to read: every token of a text is shaded by the weight w that mid-training gives it at its first "
            "update. Underlined on blue: the reference (the RL-tuned model, p_RL) finds it likelier than the model "
            "before annealing (p_θ) does, by more than elsewhere in the text, so it is lifted. Dotted on orange: "
            "damped. delta = log p_RL − log p_θ, in nats. Point at a token for its numbers.",
            "quiet",
        ),
        legend,
    ]
    for index, node in enumerate(nodes[:MAX_SCOPES]):
        parts.append(_build_scope(run, node, is_open=index == 0))
    if len(nodes) > MAX_SCOPES:
        rest = ", ".join(compute_arm(node).label for node in nodes[MAX_SCOPES:])
        parts.append(build_paragraph(f"Not shown here, to keep the page small: {rest}.", "callout"))
    return "".join(parts)
