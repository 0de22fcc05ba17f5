"""What an operator sees of a long computation: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import io

import pytest
from mm_autofocus import console
from rich.console import Console


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 80 columns is sent."""
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    monkeypatch.setattr(console, "make_console", lambda *, stderr=False: terminal)
    return out


@pytest.mark.parametrize(("total", "of"), [(3, None), (None, 3)])
def test_a_bar_on_a_terminal(seen: io.StringIO, total: int | None, of: int | None) -> None:
    with console.progress_bar("asking", total) as done:
        for k in range(3):
            done(k + 1, of)
    assert "asking" in seen.getvalue()
    assert "3/3" in seen.getvalue()


def test_nothing_where_it_is_to_be_quiet(seen: io.StringIO) -> None:
    with console.progress_bar("asking", 3, quiet=True) as done:
        done(1)
    assert not seen.getvalue()


def test_nothing_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress_bar("asking", 3) as done:
        done(1)
    assert capsys.readouterr() == ("", "")
