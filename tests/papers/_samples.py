"""Reproductions to try the machinery on, written into a folder of the test's own."""

from pathlib import Path
from textwrap import indent

HEAD = '''"""{summary}"""
import time
from pathlib import Path

from perturbkit.papers import Comparison, Evidence, Run, paper


@paper(
    number={number}, title={title!r}, authors="Ada, Bob", year=2020, arxiv="2001.00001",
    claim={claim!r}, method={method!r}, needs={needs!r}, input={input!r}, cost="n rows", seconds=1,
)
def reproduce(run: Run) -> Evidence:
'''

HOLDS = """
from matplotlib.figure import Figure

print("a reproduction may print")
ours = [run.rng(f"seed {s}").random() for s in run.seeds(3)]
figure = Figure(figsize=(3, 2), layout="constrained")
figure.subplots().plot(ours)
claim = Comparison.over_seeds("error", ours, [v + 1 for v in ours], "lower", margin=0.5)
control = Comparison("error of a coin", 2.0, 1.0, "lower", control=True)
return Evidence([claim, control], figure, "three seeds")
"""
FAILS = 'return Evidence([Comparison("accuracy", 0.5, 0.7, "higher")])'
RAISES = 'raise ValueError("no <such> thing")'
SLEEPS = "time.sleep(120)"


def write(
    root: Path,
    place: str,
    body: str = HOLDS,
    *,
    number: int = 1,
    title: str = "A paper",
    claim: str = "It is better.",
    method: str = "perturbkit.core.Oracle",
    needs: str = "forward",
    input: str = "any",
    summary: str = "A claim is tested here.",
) -> Path:
    """Write ``root/PACKAGE/KEY.py`` for the place "PACKAGE/KEY" with the function's body."""
    path = root / f"{place}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = HEAD.format(
        number=number, title=title, claim=claim, method=method, needs=needs, input=input, summary=summary
    )
    path.write_text(head + indent(body.strip("\n"), "    ") + "\n", encoding="utf-8")
    return path
