"""Progress bars for a chain: one bar a running stage, one line a finished one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from hpc.stages import Stage
from hpc.status import Advance, duration

_PLAIN_EVERY = 30.0  # seconds between lines of a stage where there is no terminal


class Bars:
    """An observer for `drive` that shows what happens on a console.

    On a terminal: bars. Elsewhere (a log, a pipe): plain lines, one now and then.

    Args:
        console: Where to; by default standard error, so that output can be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._said: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        # No thread of its own: the driver starts processes, which threads disturb.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}", justify="right"),
            TextColumn("{task.fields[told]}", style="dim"),
            console=self.console,
            auto_refresh=False,
            transient=True,
        )

    def __enter__(self) -> Bars:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()
        if self.console.is_terminal:
            self._progress.stop()

    def kept(self, stage: Stage) -> None:
        """A stage was complete before: a word on it."""
        self._say(Text.assemble(("✓ ", "dim green"), (f"{stage.name}  ", "dim"), ("kept", "dim")))

    def started(self, stage: Stage, attempt: int, workers: int) -> None:
        """Begins the stage's bar."""
        if not self.console.is_terminal:
            self._say(Text(f"{stage.name}: started"))
            self._said[stage.name] = time.monotonic()
        elif stage.name not in self._tasks:
            task = self._progress.add_task(stage.name, total=None, count="", told="starting")
            self._tasks[stage.name] = task
            self._progress.refresh()

    def progress(self, stage: Stage, now: Advance, rate: float) -> None:
        """Moves the stage's bar."""
        told = "  ".join(self._told(now, rate))
        count = f"{now.done:,}/{now.total:,}" if now.total else ""
        if stage.name in self._tasks:
            total = now.total or None
            self._progress.update(
                self._tasks[stage.name], completed=now.done, total=total, count=count, told=told
            )
            self._progress.refresh()
        elif time.monotonic() - self._said.get(stage.name, 0.0) >= _PLAIN_EVERY:
            self._said[stage.name] = time.monotonic()
            self._say(Text(f"{stage.name}: {count}  {told}"))

    def finished(self, stage: Stage, manifest: Mapping[str, Any]) -> None:
        """Turns the stage's bar into a line."""
        self._drop(stage)
        if skipped := manifest.get("skipped"):
            told = f"skipped by {skipped['by']}: {skipped['reason']}"
            self._say(Text.assemble(("– ", "dim green"), f"{stage.name}  ", (told, "dim")))
            return
        parts = [duration(manifest["seconds"])]
        if manifest["rows"]:
            parts.append(f"{manifest['rows']:,} rows")
        line = Text.assemble(("✓ ", "green"), f"{stage.name}  ", ("  ".join(parts), "dim"))
        if manifest["errors"]:
            line.append(f"  {manifest['errors']:,} errors", "yellow")
        counts = manifest.get("counts", {})
        if dropped := sum(n for name, n in counts.items() if name.startswith("dropped: ")):
            line.append(f"  {dropped:,} dropped", "yellow")
        self._say(line)

    def retried(self, stage: Stage, reason: str) -> None:
        """Says why a stage is tried again."""
        self._say(Text.assemble(("↻ ", "yellow"), f"{stage.name}  ", (reason, "yellow")))

    def failed(self, stage: Stage, reason: str) -> None:
        """Marks the stage that stops the chain; the error itself is shown by who catches it."""
        self._drop(stage)
        self._say(Text.assemble(("✗ ", "red"), f"{stage.name}"))

    def _told(self, now: Advance, rate: float) -> list[str]:
        told = [f"{rate:.3g}/s"] if rate else []
        if rate and now.total > now.done:
            told.append(f"{duration((now.total - now.done) / rate)} left")
        return told + [f"{name} {value:.4g}" for name, value in now.numbers.items()]

    def _drop(self, stage: Stage) -> None:
        if stage.name in self._tasks:
            self._progress.remove_task(self._tasks.pop(stage.name))

    def _say(self, line: Text) -> None:
        self.console.print(line, soft_wrap=not self.console.is_terminal, highlight=False)
