"""``perturbkit papers``: list, search, show and reproduce the papers, and write their gallery."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from perturbkit.papers.records import PaperRecord

# Nothing of perturbkit is imported up here: `perturbkit --help` reads this module.

app = typer.Typer(no_args_is_help=True, help="The papers behind the methods, and their reproductions.")

Needs = Annotated[
    list[str] | None,
    typer.Option(
        "--needs",
        help="Only methods that need no more than this: forward, gradient, weights, training, data.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="Only methods for this kind of input: image, tabular, text, ..."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of results and gallery.")]
Root = Annotated[
    Path | None, typer.Option("--root", hidden=True, help="Folder of reproductions, by package.")
]
_OUT = Path("gallery")


@app.command("list")
def list_(
    package: Annotated[list[str] | None, typer.Option("--package", help="Only this package.")] = None,
    needs: Needs = None,
    input: Inputs = None,
    as_json: AsJson = False,
    root: Root = None,
) -> None:
    """List the papers."""
    records = _filtered(_records(root), needs, input)
    if package:
        _known_packages(package, _records(root))
        records = [r for r in records if r.package in package]
    _print_records(records, as_json)


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS", help="What to look for.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most this many.")] = 10,
    needs: Needs = None,
    input: Inputs = None,
    as_json: AsJson = False,
    root: Root = None,
) -> None:
    """Rank the papers by title, claim and the method's documentation."""
    from perturbkit.papers.ranking import rank

    found = rank(" ".join(words), _filtered(_records(root), needs, input))[:limit]
    _print_records([record for record, _ in found], as_json, [score for _, score in found])


@app.command()
def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="As in the list.")],
    out: Out = _OUT,
    as_json: AsJson = False,
    root: Root = None,
) -> None:
    """Show one paper: claim, method, sources, and what the last run found."""
    from perturbkit.papers.records import method_source
    from perturbkit.papers.runner import fingerprint, read_outcome

    (record,) = _selected([key], _records(root))
    outcome = read_outcome(out, record.key)
    source = method_source(record.method) if record.method else None
    if as_json:
        result = None if outcome is None else _public(outcome)
        _print_json(record.to_dict() | {"source": str(source) if source else None, "result": result})
        return
    rows = {
        "paper": f"{record.title} ({record.authors}, {record.year})",
        "arXiv": record.arxiv or "none",
        "claim": record.claim,
        "here": record.summary,
        "method": record.method,
        "needs": record.needs,
        "input": record.input,
        "cost": f"{record.cost}; the reproduction takes about {record.seconds:g} s",
        "code": f"{source or 'not found'}",
        "reproduction": str(record.path),
        "problem": record.problem or "",
    }
    typer.echo(f"{record.key}  number {record.number}, {record.package}")
    for name, text in rows.items():
        if text:
            typer.echo(f"  {name:<13}{text}")
    if outcome is None:
        typer.echo(f"  {'result':<13}not run; perturbkit papers reproduce {record.key}")
        return
    stale = "" if outcome["fingerprint"] == fingerprint(record) else ", of an earlier version of the source"
    typer.echo(f"  {'result':<13}{_verdict(outcome)}, seed {outcome['seed']}{stale}")
    _print_outcome(outcome, details_only=True)


@app.command()
def reproduce(
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY...", help="Which papers.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All papers.")] = False,
    package: Annotated[list[str] | None, typer.Option("--package", help="All papers of a package.")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="How many at once; each then keeps to one core.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of every run.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", min=0.01, help="Seconds for each.")] = 600.0,
    out: Out = _OUT,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="tcp://HOST:PORT", help="Run on this Dask cluster.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is already finished.")] = False,
    as_json: AsJson = False,
    root: Root = None,
) -> None:
    """Run reproductions; what is finished is saved at once and not run again for the same seed and source.

    Exit code 0: every claim holds; 1: some do not, or failed; 2: usage; 130: interrupted.
    """
    from perturbkit.papers.runner import run_papers

    records = _records(root)
    chosen = _selected(keys or [], records)
    if package:
        _known_packages(package, records)
        chosen += [r for r in records if r.package in package]
    if all_:
        chosen += records
    if not chosen:
        _refuse("no paper is named; allowed: keys, --package or --all. See 'perturbkit papers list'.")
    chosen = list({record.key: record for record in chosen}.values())
    outcomes: list[dict[str, Any]] = []
    code = 0
    try:
        with _reporter(len(chosen)) as show_progress:

            def finished(outcome: dict[str, Any], done: int, total: int) -> None:
                outcomes.append(outcome)
                show_progress(outcome, done, total)

            outcomes = run_papers(
                chosen,
                out,
                seed=seed,
                jobs=jobs,
                timeout=timeout,
                fresh=fresh,
                cluster=cluster,
                finished=finished,
            )
        code = 0 if all(outcome["holds"] for outcome in outcomes) else 1
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {len(outcomes)} of {len(chosen)} are saved in {out / 'results'}", err=True)
        code = 130
    if as_json:
        _print_json([_public(outcome) for outcome in outcomes])
    else:
        for outcome in outcomes:
            _print_outcome(outcome)
        holding = sum(outcome["holds"] for outcome in outcomes)
        typer.echo(f"{holding} of {len(chosen)} hold; results in {out / 'results'}")
    raise typer.Exit(code)


@app.command()
def gallery(out: Out = _OUT, root: Root = None) -> None:
    """Write a site of all papers, with figures, numbers and verdicts, from the saved results."""
    from perturbkit.papers.gallery import write_gallery

    typer.echo(f"wrote {write_gallery(_records(root), out)}")


def _records(root: Path | None) -> list[PaperRecord]:
    from perturbkit.papers.records import discover

    return discover(root)


def _filtered(
    records: Sequence[PaperRecord], needs: Sequence[str] | None, inputs: Sequence[str] | None
) -> list[PaperRecord]:
    from perturbkit.core import checks
    from perturbkit.papers.records import NEEDS, words

    for need in needs or []:
        checks.one_of("--needs", need, NEEDS)
    known = sorted({word for record in records for word in words(record.input)})
    for kind in inputs or []:
        checks.one_of("--input", kind, known)
    return [r for r in records if r.accepts(tuple(needs or ()), tuple(inputs or ()))]


def _selected(keys: Sequence[str], records: Sequence[PaperRecord]) -> list[PaperRecord]:
    """Return the records of the keys, or refuse with what is near."""
    import difflib

    by_key = {record.key: record for record in records}
    for key in keys:
        if key not in by_key:
            near = (
                difflib.get_close_matches(key, by_key, n=3, cutoff=0.5) or [k for k in by_key if key in k][:3]
            )
            hint = f"Did you mean {', '.join(near)}?" if near else "See 'perturbkit papers list'."
            _refuse(f"no paper has the key {key!r}; allowed: one of {len(by_key)} keys. {hint}")
    return [by_key[key] for key in keys]


def _known_packages(names: Sequence[str], records: Sequence[PaperRecord]) -> None:
    from perturbkit.core import checks

    for name in names:
        checks.one_of("--package", name, sorted({r.package for r in records}))


def _refuse(message: str) -> None:
    from perturbkit.core import checks

    raise checks.ArgumentError(message)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _public(outcome: dict[str, Any]) -> dict[str, Any]:
    return {name: outcome[name] for name in ("key", "package", "holds", "error", "seconds", "comparisons")}


def _print_records(
    records: Sequence[PaperRecord], as_json: bool, scores: Sequence[float] | None = None
) -> None:
    if as_json:
        rows = [record.to_dict() for record in records]
        _print_json([row | {"score": s} for row, s in zip(rows, scores, strict=True)] if scores else rows)
        return
    import shutil

    # A pipe gets whole titles, a terminal lines that fit.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    columns = [(r.key, r.package, str(r.year or ""), r.needs, r.input) for r in records]
    widths = [max((len(row[i]) for row in columns), default=0) for i in range(5)]
    for record, row in zip(records, columns, strict=True):
        head = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True))
        line = f"{head}  {record.title or f'cannot be read: {record.problem}'}"
        typer.echo(line if len(line) <= width else line[: width - 1] + "…")
    if not records:
        typer.echo("no paper matches", err=True)


def _verdict(outcome: dict[str, Any]) -> str:
    return "failed" if outcome["error"] else "holds" if outcome["holds"] else "does not hold"


def _print_outcome(outcome: dict[str, Any], *, details_only: bool = False) -> None:
    if not details_only:
        head = (
            f"{_verdict(outcome):<13}  {outcome['key']}  ({outcome['package']}, {outcome['seconds']:.1f} s)"
        )
        typer.secho(head, fg="green" if outcome["holds"] else "red")
    if outcome["error"]:
        typer.echo(f"    {outcome['error']}")
    for row in outcome["comparisons"]:
        typer.echo(f"    {'ok ' if row['holds'] != row['control'] else 'not'} {comparison_text(row)}")


def comparison_text(row: dict[str, Any]) -> str:
    """Return one line for a comparison: metric, both numbers, what was asked, spread and number of seeds."""
    from perturbkit.papers.gallery import asked, shown

    spread = "" if row["spread"] is None else f", ± {shown(row['spread'])}"
    repeated = f", n = {row['n']}" if row["n"] > 1 else ""
    control = "control, must fail: " if row["control"] else ""
    return f"{control}{row['metric']}: {shown(row['ours'])} against {shown(row['baseline'])} ({asked(row)}{spread}{repeated})"


@contextmanager
def _reporter(total: int) -> Iterator[Callable[[dict[str, Any], int, int], None]]:
    """Report on standard error: a bar with the time left at a terminal, else one line a paper."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":

        def line(outcome: dict[str, Any], done: int, total: int) -> None:
            typer.echo(
                f"[{done}/{total}] {outcome['key']}: {_verdict(outcome)}, {outcome['seconds']:.1f} s",
                err=True,
            )

        yield line
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *left, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reproducing", total=total)

        def advance(outcome: dict[str, Any], done: int, total: int) -> None:
            bar.update(task, completed=done, description=escape(f"{outcome['key']} {_verdict(outcome)}"))

        yield advance
