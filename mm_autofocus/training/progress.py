"""What is seen of a training: a bar on a terminal, lines elsewhere, and ``log.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mm_autofocus.console import make_console

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["TrainingDisplay", "read_log"]

_LINE_EVERY_S = 60.0


class TrainingDisplay:
    """Shows a training on standard error; a context manager.

    Parameters
    ----------
    log : Path | None
        ``log.jsonl`` of the run, appended to; None: nothing is shown or written, as in all
        processes but the first.
    epochs, steps : int
        How many epochs, and steps of each.
    """

    def __init__(self, log: Path | None, epochs: int, steps: int) -> None:
        self.log, self.epochs, self.steps = log, epochs, steps
        self.console = make_console(stderr=True)
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if log is not None and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=epochs * steps, note="")

    def __enter__(self) -> TrainingDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: int, step: int, loss: float, rate: float) -> None:
        """Show one step: epoch and step from 0, patches per second."""
        if self.log is None:
            return
        note = f"loss {loss:.3f}  {rate:.0f} patches/s"
        if self._bar is not None:
            done = epoch * self.steps + step + 1
            name = f"epoch {epoch + 1}/{self.epochs}"
            self._bar.update(self._task, completed=done, description=name, note=note)
        elif time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            self._line(f"epoch {epoch + 1}/{self.epochs}  {step + 1}/{self.steps}  {note}")

    def epoch(self, row: dict[str, Any], figures: str) -> None:
        """Show and write down one finished epoch; `figures` of the validation, in words."""
        if self.log is None:
            return
        with self.log.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        star = " *" if row["best"] else ""
        self._line(
            f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.4f}  {figures}  "
            f"{row['patches_per_s']:.0f} patches/s  {row['seconds']:.0f} s{star}"
        )
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Show a sentence."""
        if self.log is not None:
            self._line(text)

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``log.jsonl``, one per epoch.

    What a process that was killed left unfinished is left out; of an epoch that was done
    twice, because it was killed before the checkpoint, the second counts.
    """
    rows: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                rows[row["epoch"]] = row
            except ValueError:
                continue
    return [rows[epoch] for epoch in sorted(rows)]
