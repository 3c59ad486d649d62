"""Progress: silent away from a terminal, and every reporter is started, advanced and stopped."""

import io
import sys

import pytest

from perturbkit.core import Progress, track


class Log:
    def __init__(self) -> None:
        self.events: list[object] = []

    def start(self, description: str, total: int | None) -> None:
        self.events.append(("start", description, total))

    def advance(self, steps: int = 1) -> None:
        self.events.append(steps)

    def stop(self) -> None:
        self.events.append("stop")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_reporter_gets_everything() -> None:
    log = Log()
    assert isinstance(log, Progress)
    assert list(track("abc", "letters", progress=log)) == ["a", "b", "c"]
    assert log.events == [("start", "letters", 3), 1, 1, 1, "stop"]
    log = Log()
    list(track(iter("ab"), "letters", total=7, progress=log))
    assert log.events[0] == ("start", "letters", 7)
    log = Log()
    list(track(iter("ab"), "letters", progress=log))
    assert log.events[0] == ("start", "letters", None)


def test_a_reporter_is_stopped_after_an_exception_and_when_left_early() -> None:
    def broken():
        yield 1
        raise KeyError

    log = Log()
    with pytest.raises(KeyError):
        list(track(broken(), "work", progress=log))
    assert log.events == [("start", "work", None), 1, "stop"]
    log = Log()
    left = track([1, 2, 3], "work", progress=log)
    next(left)
    left.close()
    assert log.events == [("start", "work", 3), "stop"]


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [
        (None, False, False),
        (None, True, True),
        (False, True, False),
        (True, False, True),
    ],
)
def test_the_bar_is_shown_where_it_should(monkeypatch, progress, terminal: bool, shown: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(track([1, 2], "counting rows", progress=progress)) == [1, 2]
    assert ("counting rows" in stream.getvalue()) == shown
