"""`polm data inspect` on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polm.apps import cli
from polm.apps.inspect import mark_pieces, parse_columns
from polm.data.inspection import Piece
from polm.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "add 1 and 2 ."}, {"role": "assistant", "content": "#### 3"}]}


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """inspect("a.jsonl", "--context", "8"): exit code, output and errors of `polm data inspect …`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "console", Console(width=160))

    def run(*words: str, command: tuple[str, ...] = ("data", "inspect")) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["polm", *command, *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def test_with_a_tokenizer(inspect: Any, artifact: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", CHAT, {**CHAT, "url": "x"}, {"messages": []})
    code, out, err = inspect(file, "--tokenizer", str(artifact("tokenizer")), "--context", "8")
    assert (code, err) == (0, "")
    assert "messages (conversation records; each of the first 3 rows has messages; messages (a list))" in out
    assert "2 of 3 rows, 1 cannot be used" in out
    assert "columns ignored" in out
    assert "url (1 rows)" in out
    assert "2 records (100.0 %) are longer than 8 tokens; 4 tokens would be cut off" in out
    assert "10 – 10" in out
    assert "← over the context" in out
    assert "a.jsonl:3: messages must be a list of messages with at least one" in out
    assert "a.jsonl:1, as it is trained on" in out
    assert "<|assistant|>⟦####│3│<|eos|>⟧" in out
    assert "\x1b[" not in out  # no terminal, so no colour: the signs alone mark what is supervised
    assert inspect(file, "--tokenizer", str(artifact("tokenizer")), "--context", "8", command=("inspect",)) == (
        0,
        out,
        "",
    )


def test_without_a_tokenizer_it_says_so(inspect: Any, tmp_path: Path) -> None:
    code, out, _ = inspect(write(tmp_path / "a.jsonl", CHAT))
    assert code == 0
    assert "7, of which 2 supervised (28.6 %)" in out
    assert "words between white space; with --tokenizer PATH tokens are counted and marked" in out
    assert "⟦#### 3⟧" in out


def test_columns_and_formats(inspect: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "q", "final": "12"})
    code, _, err = inspect(file)
    assert code == 2
    assert "fit no known format" in err
    code, out, _ = inspect(file, "--column", "prompt=question", "--column", "answer=final")
    assert code == 0
    assert "prompts (prompt records" in out
    code, out, _ = inspect(file, "--column", "text=question", "--format", "text")
    assert (code, "text (document records; as named)" in out) == (0, True)
    assert inspect(file, "--column", "prompt")[::2] == (
        2,
        "error: --column 'prompt' is not of the form ours=theirs, for example --column prompt=question\n",
    )
    assert "--template needs --tokenizer" in inspect(file, "--template", "chatml")[2]
    assert "--context" not in inspect(file, "--column", "text=question", "--format", "text")[2]
    assert "counted in tokens" in inspect(file, "--column", "text=question", "--format", "text", "--context", "9")[2]
    with pytest.raises(UserError, match="ours=theirs"):
        parse_columns(["=x"])


def test_text_of_the_file_is_shown_and_not_obeyed(inspect: Any, tmp_path: Path) -> None:
    """Markup, escape sequences and characters that turn the reading direction, in texts, names and errors."""
    hostile = "[bold red]x[/bold red] [/] \x1b[31mred\x1b[0m \u202eback ⟦fake⟧ │"
    file = write(tmp_path / "a.jsonl", {"text": hostile, "\x1b[2J[/]": 1}, {"text": 3, "[/x]\x1b": 1})
    code, out, _ = inspect(file)
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "⟦[bold red]x[/bold red] [/] ⟨U+001B⟩[31mred⟨U+001B⟩[0m ⟨U+202E⟩back [[fake]] |⟧" in out
    assert "⟨U+001B⟩[2J[/] (1 rows)" in out


def test_a_data_set_folder_is_shown_file_by_file(inspect: Any, artifact: Any) -> None:
    code, out, err = inspect(str(artifact("data")))
    assert (code, err) == (0, "")
    shown = [line.split("/")[-1].strip() for line in out.splitlines() if line.startswith("file ")]
    assert shown == ["pretrain.jsonl", "midtrain.jsonl", "sft.jsonl", "prompts.jsonl"]


def test_marks() -> None:
    pieces = [Piece("q ", 0.0, 2), Piece("a", 1.0), Piece("b", 0.5), Piece("c", 0.0), Piece("d", 2.0)]
    text = mark_pieces(pieces)
    assert text.plain == "q ⟦a│b×0.5⟧c⟦d×2⟧"
    green = {text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"}
    assert green == {"⟦", "a", "│", "b", "⟧", "d"}
    assert mark_pieces([Piece("", 1.0)]).plain == "⟦⟧"


def test_a_stage_may_still_be_run(inspect: Any) -> None:
    code, _, err = inspect(command=("data",))
    assert (code, "polm data needs out" in err) == (2, True)
