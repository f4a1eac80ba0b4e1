"""Two runs side by side: differences by hand, what may be compared, and what is said about the rest."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polm.errors import StoreError
from polm.evals.statistics import compute_t_interval
from polm.report.compare import Arm
from polm.report.compare_runs import Cost, Differences, FieldChange, compare_arms, compare_runs
from polm.report.compare_show import build_comparison_page, build_comparison_tables, describe_verdict
from polm.report.load import Run, load_run

Items = list[dict[str, Any]]
WriteRun = Callable[..., Run]


def item(benchmark: str, number: int, correct: int, **more: Any) -> dict[str, Any]:
    basic = {"benchmark": benchmark, "id": str(number), "prompt": f"{benchmark} {number}?", "answer": str(number)}
    return {**basic, "greedy_correct": correct, "nll": 2.0, "nll_tokens": 4, **more}


def items_of(correct: str, benchmark: str = "add", **more: Any) -> Items:
    """ "101" -> three items, the second one wrong."""
    return [item(benchmark, number, int(digit), **more) for number, digit in enumerate(correct)]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """write_run("a", {"s0/c0/ntp/eval_base": items}, recipe=…, data={seed: (key, files)}, keys={node: key})."""

    def write(
        name: str,
        evaluations: dict[str, Items],
        *,
        recipe: dict[str, Any] | None = None,
        data: dict[int, tuple[str, dict[str, Any]]] | None = None,
        config: dict[str, Any] | None = None,
        seconds: float = 5.0,
    ) -> Run:
        folder = tmp_path / name
        nodes = []

        def add(node_id: str, stage: str, key: str, **more: Any) -> Path:
            nodes.append({"id": node_id, "stage": stage, "key": key, "artifact": f"store/{stage}-{key}", **more})
            artifact = folder / "store" / f"{stage}-{key}"
            artifact.mkdir(parents=True)
            manifest = {"key": key, "stage": stage, "files": {}, "seconds": seconds, "peak_rss_mb": 100 * seconds}
            (artifact / "manifest.json").write_text(json.dumps(manifest))
            return artifact

        for seed, (key, files) in (data or {}).items():
            artifact = add(f"s{seed}/data", "data", key, seed=seed)
            manifest = json.loads((artifact / "manifest.json").read_text())
            (artifact / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        for index, (node_id, items) in enumerate(evaluations.items()):
            seed, cycle, arm, _ = node_id.split("/")
            place = {"seed": int(seed[1:]), "cycle": int(cycle[1:]), "arm": arm}
            artifact = add(node_id, "eval", f"{name}{index}", config=config or {}, **place)
            (artifact / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
            names = {row["benchmark"]: {"num_items": 1} for row in items} or {"add": {"num_items": 1}}
            (artifact / "results.json").write_text(json.dumps({"format": "plain", "benchmarks": names}))
        (folder / "run.json").write_text(json.dumps({"name": name, "nodes": nodes, "recipe": recipe or {}}))
        return load_run(folder)

    return write


def greedy_of(found: Differences, benchmark: str | None = None) -> Any:
    (one,) = (d for d in found.differences if d.row.benchmark == benchmark and d.row.metric.key == "greedy")
    return one


def show(found: Differences, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for table in build_comparison_tables(found):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_differences_by_hand(write_run: WriteRun) -> None:
    """Second minus first, paired by seed; the average over two benchmarks is plain."""
    first = {f"s{s}/c0/ntp/eval_rl": [*items_of("1000"), *items_of("10", "sort")] for s in (0, 1, 2)}
    better = {0: "1110", 1: "1111", 2: "1110"}
    second = {f"s{s}/c0/ntp/eval_rl": [*items_of(better[s]), *items_of("10", "sort")] for s in (0, 1, 2)}
    found = compare_runs(write_run("a", first), write_run("b", second))
    one = greedy_of(found)
    expected = compute_t_interval([0.25, 0.375, 0.25])
    assert one.row.comparison.interval.mean_difference == pytest.approx(expected.mean_difference)
    assert one.row.comparison.interval.low95 == pytest.approx(expected.low95)
    assert one.row.comparison.differences_by_seed == (0.25, 0.375, 0.25)
    assert (one.first.mean, one.row.score.mean) == (pytest.approx(0.375), pytest.approx(2 / 3))
    assert one.row.verdict == "better"
    assert greedy_of(found, "sort").row.verdict == "undecided"
    assert (found.seeds, found.points, found.arms) == ((0, 1, 2), ("rl",), (Arm(0, "ntp"),))
    assert found.notes == ()
    assert "Of 2 averages over benchmarks, b is better in 1 and worse in 0" in describe_verdict(found)
    text = show(found)
    assert "▲ +29.2" in text
    assert "t interval over 3 seeds" in " ".join(text.split())
    # The other way round it is the same with the other sign.
    other = greedy_of(compare_runs(write_run("c", second), write_run("d", first)))
    assert other.row.verdict == "worse"


def test_one_seed_shows_nothing(write_run: WriteRun) -> None:
    node = "s0/c0/ntp/eval_base"
    found = compare_runs(write_run("a", {node: items_of("0" * 20)}), write_run("b", {node: items_of("1" * 20)}))
    assert greedy_of(found).row.verdict == "undecided"
    assert "nothing is shown" in describe_verdict(found)
    assert "one seed proves nothing" in build_comparison_page(found)
    assert "▲" not in show(found)


def test_only_common_items_are_compared(write_run: WriteRun) -> None:
    """An id alone is not enough: the same id may stand for another question."""
    node = "s0/c0/ntp/eval_base"
    mine = [*items_of("0000"), *items_of("11", "sort")]
    others = [*items_of("011111"), *items_of("00", "max")]
    others[3]["prompt"] = "another question?"
    others[2]["answer"] = "17"
    data = [{0: (key, {f"benchmarks/{n}.jsonl": {"sha256": sha} for n in ("add",)})} for key, sha in ("kx", "ly")]
    found = compare_runs(write_run("a", {node: mine}, data=data[0]), write_run("b", {node: others}, data=data[1]))
    add, most, sort = found.matches
    assert (add.name, add.num_first, add.num_second, add.num_common) == ("add", 4, 6, 2)
    assert (most.num_common, sort.num_common) == (0, 0)
    assert add.source == "another benchmark file"
    assert sort.source == "other data"
    assert greedy_of(found).row.comparison.interval.mean_difference == 0.5
    assert greedy_of(found).row.comparison.num_items == 2
    assert found.notes[0] == (
        "Benchmark add: 2 items in common of 4 and 6 (another benchmark file); only those are compared."
    )
    assert "Benchmark sort: 0 items in common of 2 and 0 (other data); left out." in found.notes


@pytest.mark.parametrize(
    ("keys", "prints", "source"),
    [("kk", "xy", "the same data"), ("kl", "xx", "other data, the same benchmark file")],
)
def test_what_the_manifests_say(write_run: WriteRun, keys: str, prints: str, source: str) -> None:
    node = "s0/c0/ntp/eval_base"
    runs = [
        write_run(name, {node: items_of("01")}, data={0: (key, {"benchmarks/add.jsonl": {"sha256": sha, "bytes": 1}})})
        for name, key, sha in zip("ab", keys, prints, strict=True)
    ]
    assert [m.source for m in compare_runs(*runs).matches] == [source]


def test_seeds_and_arms_without_a_partner_are_named(write_run: WriteRun) -> None:
    first = {f"s{s}/c0/ntp/eval_base": items_of("01") for s in (0, 1, 2)} | {"s0/c1/remit/eval_rl": items_of("1")}
    second = {f"s{s}/c0/ntp/eval_base": items_of("11") for s in (1, 2, 3)}
    second["s2/c0/ntp/eval_base"] = items_of("11", prompt="all other questions")
    found = compare_runs(write_run("a", first), write_run("b", second))
    assert found.seeds == (1,)
    assert set(found.notes) == {
        "Without a partner in b: remit · cycle 1 after RL.",
        "Seeds of a without a partner: 0, 2.",
        "Seeds of b without a partner: 2, 3.",
        "Seeds left out, as their benchmarks have no item in common: 2.",
    }


def test_nothing_in_common_is_refused(write_run: WriteRun) -> None:
    node = "s0/c0/ntp/eval_base"
    one = write_run("a", {node: items_of("01")})
    with pytest.raises(StoreError, match=r"nothing to compare: a has ntp · cycle 0 with seeds 0; b has .* seeds 1"):
        compare_runs(one, write_run("b", {"s1/c0/ntp/eval_base": items_of("01")}))
    with pytest.raises(StoreError, match=r"no benchmark has an item in common \(add: 2 and 0 items, .*; sort: 0 and 1"):
        compare_runs(one, write_run("c", {node: items_of("0", "sort")}))
    with pytest.raises(StoreError, match="d has no finished evaluation"):
        compare_runs(one, write_run("d", {}, data={0: ("k", {})}))
    with pytest.raises(StoreError, match="no benchmark has an item in common"):
        compare_runs(one, write_run("e", {node: []}))
    with pytest.raises(StoreError, match="is given twice"):
        compare_runs(one, one)


def test_likelihoods_of_two_tokenizers_are_left_out(write_run: WriteRun) -> None:
    node = "s0/c0/ntp/eval_base"
    one = write_run("a", {node: items_of("01")})
    same = compare_runs(one, write_run("b", {node: items_of("01", nll=3.0)}))
    (nll,) = (d for d in same.differences if d.row.metric.key == "nll" and d.row.benchmark is None)
    assert nll.row.comparison is not None
    assert nll.row.comparison.interval.mean_difference == pytest.approx(0.25)
    other = compare_runs(one, write_run("c", {node: items_of("01", nll_tokens=5)}))
    assert {d.row.metric.key for d in other.differences} == {"greedy"}
    assert any("two tokenizers" in note for note in other.notes)


def test_other_settings_of_the_evaluation_are_named(write_run: WriteRun) -> None:
    node = "s0/c0/ntp/eval_base"
    one = write_run("a", {node: items_of("01")}, config={"temperature": 1.0, "num_items": 10})
    other = write_run("b", {node: items_of("01")}, config={"temperature": 0.5, "num_items": 20})
    (note,) = compare_runs(one, other).notes
    assert note.startswith("The evaluations were made with other settings: temperature.")


def test_recipes_and_costs(write_run: WriteRun) -> None:
    node = "s0/c0/ntp/eval_base"
    recipe = {"name": "a", "sft": {"epochs": 1, "bins": [1, 2]}, "dpo": {"beta": 0.1}}
    one = write_run("a", {node: items_of("01")}, recipe=recipe)
    changed = {"name": "b", "sft": {"epochs": 2, "bins": [1, 2]}, "dpo": None}
    other = write_run("b", {node: items_of("01")}, recipe=changed, seconds=90.0, data={0: ("k", {})})
    found = compare_runs(one, other)
    assert found.changes == (
        FieldChange("name", '"a"', '"b"'),
        FieldChange("sft.epochs", "1", "2"),
        FieldChange("dpo.beta", "0.1", None),
        FieldChange("dpo", None, "null"),
    )
    assert found.costs == {"eval": (Cost(1, 5.0, 500.0), Cost(1, 90.0, 9000.0)), "data": (None, Cost(1, 90.0, 9000.0))}
    text = show(found)
    assert "not set" in text
    assert "90 s" in text
    assert "9.0 GB" in text


def test_two_arms_of_one_run(small_run: Path) -> None:
    run = load_run(small_run)
    found = compare_arms(run, "rho1", "remit")
    assert (found.first, found.second) == ("rho1", "remit")
    assert [arm.label for arm in found.arms] == ["remit against rho1 · cycle 1"]
    assert found.seeds == (0, 1)
    assert found.points == ("base", "sft", "dpo", "rl")
    assert {match.source for match in found.matches} == {"the same data"}
    assert found.k == 4
    with pytest.raises(StoreError, match="no arm 'rho'; its arms are: ntp, remit, rho1"):
        compare_arms(run, "rho", "remit")
    with pytest.raises(StoreError, match=r"nothing to compare: .* `polm report` compares each arm of a run with it"):
        compare_arms(run, "ntp", "remit")  # no cycle in common; the report has that comparison
    with pytest.raises(StoreError, match="names one arm twice"):
        compare_arms(run, "remit", "remit")


def test_equal_keys_are_told(small_run: Path, build_run: Callable[..., Path]) -> None:
    found = compare_runs(load_run(small_run), load_run(build_run(seeds=2)))
    assert any("24 of 24 pairs of evaluations have the same key" in note for note in found.notes)


def test_the_page_is_closed_and_escapes_everything(write_run: WriteRun, hostile: str) -> None:
    nodes = {f"s{s}/c0/ntp/eval_base": items_of("01", hostile) for s in (0, 1)}
    one = write_run("a", nodes, recipe={"note": hostile, hostile: 1})
    other = write_run("b", nodes, recipe={"note": "plain"}, config={"x": hostile})
    page = build_comparison_page(compare_runs(one, other))
    assert "<img" not in page
    assert "onload=alert(2)&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    text = show(compare_runs(one, other), 200)
    assert "\x1b" not in text
    for number in ("<h2>What is shown</h2>", "<h2>Costs</h2>", "No difference was shown in any of 2 averages"):
        assert number in page
