"""A watch on the models under study: the seconds spent in them, and a deadline that ends long work between chunks.

For applications that must keep to a time budget or say where their time went. Methods know nothing of it: they query
an :class:`~perturbkit.core.oracle.Oracle`, which consults the watch that is on before every chunk of rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["DeadlineError", "Watch", "paced", "seconds_left", "timed"]

# With a deadline, a chunk of rows is made to last about this long, so that it is overrun by no more.
_PACE_SECONDS = 0.5


class DeadlineError(Exception):
    """The deadline of the watch was reached.

    Not a :class:`~perturbkit.core.checks.PerturbkitError`: nothing was wrong with an argument, and code that falls back
    on a refusal must not fall back on this.
    """


@dataclass(eq=False)
class Watch:
    """Seconds by what they were spent on, and the time at which work should end.

    Attributes
    ----------
    deadline : float
        By the clock of ``time.monotonic``; infinity for none.
    seconds : dict of str to float
        Time inside :func:`timed`, by its name.

    Examples
    --------
    >>> import torch
    >>> from perturbkit.core import Oracle
    >>> watch = Watch()
    >>> with watch.on():
    ...     out = Oracle(lambda x: x)(torch.zeros(2, 1))
    >>> sorted(watch.seconds)
    ['model']
    >>> watch.deadline = 0.0
    >>> with watch.on():
    ...     out = Oracle(lambda x: x)(torch.zeros(2, 1))
    Traceback (most recent call last):
    ...
    perturbkit.core.watch.DeadlineError: the time is spent
    """

    deadline: float = math.inf
    seconds: dict[str, float] = field(default_factory=dict)
    _inside: bool = False

    @contextmanager
    def on(self) -> Iterator[Watch]:
        """Let this watch be the one that is consulted, in this thread, inside the block."""
        token = _CURRENT.set(self)
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def check(self) -> None:
        """Raise :class:`DeadlineError` if the deadline has passed."""
        if self.left <= 0:
            raise DeadlineError("the time is spent")


_CURRENT: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def timed(name: str = "model") -> Iterator[None]:
    """Check the deadline, then count the time inside the block; inside another such block nothing is counted twice."""
    watch = _CURRENT.get()
    if watch is None or watch._inside:
        yield
        return
    watch.check()
    started = time.perf_counter()
    watch._inside = True
    try:
        yield
    finally:
        watch._inside = False
        watch.seconds[name] = watch.seconds.get(name, 0.0) + time.perf_counter() - started


def seconds_left() -> float:
    """Return the seconds until the deadline of the watch that is on; infinity without one."""
    watch = _CURRENT.get()
    return math.inf if watch is None else watch.left


def paced(size: int, row_seconds: float | None) -> int:
    """Return how many of ``size`` rows to take at once, so that a deadline is not overrun by a long chunk.

    All of them where no deadline is set, and one where nothing is known of the seconds that a row takes.
    """
    watch = _CURRENT.get()
    if watch is None or math.isinf(watch.deadline):
        return size
    if row_seconds is None:
        return 1
    return max(1, min(size, int(min(_PACE_SECONDS, watch.left) / max(row_seconds, 1e-9))))
