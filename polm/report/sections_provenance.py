"""Sections about where it came from: the token ledger, the lineage of artifacts, the recipe and the versions."""

from __future__ import annotations

from polm.report.escape import esc
from polm.report.load import KEY_LENGTH, Node, Run
from polm.report.markup import (
    Cell,
    build_details,
    build_paragraph,
    build_table,
    code_cell,
    number_cell,
    text_cell,
)
from polm.report.tables import format_seconds

# What a ledger counts, in the order in which a token meets it; names of other ledgers follow as they come.
LEDGER_ORDER = (
    *("read", "unknown", "split", "truncated", "dropped", "lost"),
    *("kept", "packed", "supervised", "masked", "down_weighted", "unused"),
)


def _order_entries(nodes: list[Node]) -> list[str]:
    names = list(dict.fromkeys(name for node in nodes if node.manifest for name in node.manifest.ledger))

    def rank(name: str) -> tuple[int, int]:
        plain = name.replace("-", "_")
        known = [index for index, word in enumerate(LEDGER_ORDER) if word in plain]
        return (known[0] if known else len(LEDGER_ORDER), names.index(name))

    return sorted(names, key=rank)


def section_ledger(run: Run) -> str:
    """What became of every token: read, packed, truncated, dropped, masked, down-weighted, by stage."""
    by_leaf: dict[str, list[Node]] = {}
    for node in run.nodes:
        if node.manifest is not None and node.manifest.ledger and node.status == "done":
            by_leaf.setdefault(node.leaf, []).append(node)
    if not by_leaf:
        is_to_come = any(node.status == "pending" for node in run.nodes)
        return build_paragraph("No finished stage has written a ledger yet.", "callout") if is_to_come else ""
    parts = [
        build_paragraph(
            "How to read: a row is one count of a ledger (examples, and tokens where it says so), a column is one "
            "stage. Nothing is lost in silence: what was read and not trained on has a row.",
            "quiet",
        )
    ]
    for index, (leaf, nodes) in enumerate(by_leaf.items()):
        parts.append(build_details(f"{leaf} ({len(nodes)})", _build_ledger_table(nodes), is_open=index < 3))
    return "".join(parts)


def _build_ledger_table(nodes: list[Node]) -> str:
    """A row a count: there are more counts than stages of one kind, and a narrow page has no room for their names."""
    body = [
        [text_cell(name.replace("_", " "))]
        + [number_cell(node.manifest.ledger.get(name) if node.manifest else None) for node in nodes]
        for name in _order_entries(nodes)
    ]
    return build_table(
        ["count", *(f">{node.id.removesuffix(f'/{node.leaf}')}" for node in nodes)], body, classes="slim"
    )


def section_lineage(run: Run) -> str:
    """Every node with its key and its inputs; the keys are hashes of config, inputs and version."""
    anchors = {node.id: f"node-{index}" for index, node in enumerate(run.nodes)}
    body = []
    for node in run.nodes:
        links = []
        for name, source in node.spec.inputs.items():
            target = anchors.get(str(source))
            shown = f"<code>{esc(source)}</code>"
            links.append(f"{esc(name)}: " + (f'<a href="#{target}">{shown}</a>' if target else shown))
        key = node.manifest.key if node.manifest is not None else node.spec.key
        body.append(
            [
                Cell(f'<span id="{anchors[node.id]}"><code>{esc(node.id)}</code></span>'),
                text_cell(node.spec.stage),
                Cell(f'<code title="{esc(key)}">{esc(key[:KEY_LENGTH])}</code>'),
                Cell("<br>".join(links) or "–"),
                text_cell(node.manifest.finished if node.manifest else node.status),
                Cell(esc(format_seconds(node.manifest.seconds if node.manifest else None)), "num"),
            ]
        )
    table = build_table(["node", "stage", "key", "inputs", "finished", ">time"], body, classes="lineage")
    note = build_paragraph(
        "An artifact's key is the hash of its settings, the keys of its inputs and the version of its stage. Two nodes "
        "with one key are one artifact.",
        "quiet",
    )
    num = len(run.nodes)
    return note + build_details(f"{num} node{'' if num == 1 else 's'}", table, is_open=num <= 40)


def section_recipe(run: Run) -> str:
    """The resolved recipe, every default written out."""
    if not run.recipe_text.strip():
        return "" if run.is_stage else build_paragraph("The run folder holds no recipe.", "callout")
    num_lines = run.recipe_text.count("\n") + 1
    block = f'<pre class="recipe">{esc(run.recipe_text)}</pre>'
    name = f"Settings of the stage, {num_lines} lines" if run.is_stage else f"recipe.yaml, {num_lines} lines"
    return build_details(name, block, is_open=num_lines <= 60)


def section_versions(run: Run) -> str:
    """Versions of the program and of what it stands on."""
    if not run.versions:
        return build_paragraph("The run recorded no versions.", "callout")
    return build_table(
        ["part", "version"], [[text_cell(name), code_cell(value)] for name, value in run.versions.items()]
    )
