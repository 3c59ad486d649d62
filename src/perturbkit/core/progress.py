"""One progress reporter for long work, silent when not at a terminal.

Long work takes a ``progress`` argument: ``None`` shows a bar on standard error when that is a terminal and
nothing otherwise, ``False`` shows nothing, ``True`` always shows it, and a :class:`Progress` reports to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar, runtime_checkable

__all__ = ["Progress", "ProgressLike", "track"]

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """What receives progress: anything with these three methods."""

    def start(self, description: str, total: int | None) -> None:
        """Begin a task of ``total`` units (``None``: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """Report ``steps`` more units done."""

    def stop(self) -> None:
        """End the task, also after an exception."""


ProgressLike = Progress | bool | None


class _Bar:
    """A rich progress bar with the time left."""

    def start(self, description: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            # Away from a terminal a transient bar would leave nothing at all.
            transient=console.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task(description, total=total)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)

    def stop(self) -> None:
        self._bar.stop()


def track(
    items: Iterable[T], description: str, *, total: int | None = None, progress: ProgressLike = None
) -> Iterator[T]:
    """Yield the items and report each one as it is finished.

    Parameters
    ----------
    items : iterable
        The work; its length is the total where it has one.
    description : str
        What is being done, a few words.
    total : int, optional
        Number of items, where they have no length.
    progress : Progress, bool or None
        See the module.

    Yields
    ------
    object
        The items, in order.

    Examples
    --------
    >>> list(track([1, 2, 3], "counting", progress=False))
    [1, 2, 3]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    reporter: Progress | None
    if isinstance(progress, bool) or progress is None:
        shown = progress if progress is not None else sys.stderr.isatty()
        reporter = _Bar() if shown else None
    else:
        reporter = progress
    if reporter is None:
        yield from items
        return
    reporter.start(description, total)
    try:
        for item in items:
            yield item
            reporter.advance()
    finally:
        reporter.stop()
