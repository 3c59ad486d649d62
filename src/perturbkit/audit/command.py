"""``perturbkit audit``: audit the demo or a model of one's own, and judge a saved audit by gates."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from perturbkit.audit.finding import Finding
    from perturbkit.audit.gates import Judgement
    from perturbkit.audit.plan import Plan
    from perturbkit.audit.request import AuditRequest
    from perturbkit.audit.subject import Subject

# Nothing heavy is imported up here: `perturbkit --help` reads this module.

app = typer.Typer(no_args_is_help=True, help="What may be trusted of a model, in one report.")

Profile = Annotated[
    str, typer.Option(help="How much work: quick (a minute), standard (ten), full (all rows).")
]
Rows = Annotated[int | None, typer.Option("--n", help="Rows of data at most.", show_default="the profile's")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Only = Annotated[
    list[str] | None, typer.Option(help="Run only this section; may be repeated.", show_default=False)
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Leave this section out; may be repeated.", show_default=False)
]
Gates = Annotated[Path | None, typer.Option(help="TOML file of requirements; they decide the exit code.")]
Out = Annotated[Path, typer.Option(help="Folder of the report.")]
Device = Annotated[
    str | None, typer.Option(help="Where the model runs: cpu, cuda, ...", show_default="as it is")
]
Memory = Annotated[str | None, typer.Option(help="Memory of one batch, as 512MB or 4GB.", show_default="1GB")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and the path of the report.")]
Norm = Annotated[str, typer.Option(help="Norm of the attack: linf or l2.")]
Eps = Annotated[
    str | None, typer.Option(help="Change the model should bear, as 0.03 or 8/255.", show_default=False)
]
Alpha = Annotated[float, typer.Option(help="Miscoverage allowed to conformal sets.")]

# 70 is what sysexits.h calls an internal error; 1 would say that a gate failed.
EXIT_REFUSED, EXIT_INTERNAL, EXIT_INTERRUPTED = 4, 70, 130


@app.command()
def demo(
    kind: Annotated[
        str, typer.Argument(metavar="[image|tabular|text]", help="Which bundled model.")
    ] = "image",
    profile: Profile = "quick",
    n: Rows = None,
    seed: Seed = 0,
    only: Only = None,
    skip: Skip = None,
    norm: Norm = "linf",
    eps: Eps = None,
    alpha: Alpha = 0.1,
    gates: Gates = None,
    out: Out = Path("audit"),
    device: Device = None,
    memory: Memory = None,
    quiet: Quiet = False,
) -> None:
    """Audit a bundled model on bundled data."""
    options = {
        "profile": profile, "n": n, "seed": seed, "norm": norm, "eps": _number(eps), "alpha": alpha, "device": device,
        "memory": memory,
    }  # fmt: skip

    def opened() -> Subject:
        from perturbkit.audit.demo import demo_subject

        return demo_subject(kind, memory=memory, device=device)

    _audit(opened, options, only, skip, gates, out, quiet, "perturbkit audit run MODEL DATA")


@app.command()
def run(
    model: Annotated[
        str,
        typer.Argument(
            help="module:function; .pt2, .onnx or .skops; a Hugging Face folder or hf:name; predictions.csv."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            help=".csv, .parquet, .npz, .jsonl or a folder of images by class.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="image, tabular or text.", show_default="told from the data")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of the label.", show_default="label, y, target or class")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Column of the group of a row.", show_default=False)
    ] = None,
    bounds: Annotated[
        str | None, typer.Option(help="Range of inputs, as 0,1.", show_default="0,1 for images")
    ] = None,
    profile: Profile = "quick",
    n: Rows = None,
    seed: Seed = 0,
    only: Only = None,
    skip: Skip = None,
    norm: Norm = "linf",
    eps: Eps = None,
    alpha: Alpha = 0.1,
    gates: Gates = None,
    out: Out = Path("audit"),
    device: Device = None,
    memory: Memory = None,
    quiet: Quiet = False,
) -> None:
    """Audit a model of your own.

    Exit codes: 0 every gate passed (none set: finished), 1 a gate failed, 2 usage, 3 a gated quantity could not be
    measured, 4 model or data refused, 70 an error of perturbkit's own, 130 interrupted (a partial report is written).
    """
    limits = _bounds(bounds)
    options = {
        "task": task, "profile": profile, "n": n, "seed": seed, "norm": norm, "eps": _number(eps), "alpha": alpha,
        "bounds": limits, "device": device, "memory": memory,
    }  # fmt: skip

    def opened() -> Subject:
        from perturbkit.audit.opening import open_subject

        return open_subject(
            model,
            data,
            task=task,
            label=label,
            group=groups,
            bounds=limits,
            device=device,
            memory=memory,
        )

    _audit(opened, options, only, skip, gates, out, quiet, "")


@app.command()
def check(
    audit_json: Annotated[Path, typer.Argument(help="audit.json of a report.")],
    gates: Annotated[Path, typer.Option(help="TOML file of requirements.")],
) -> None:
    """Judge a saved audit by gates, without the model."""
    with _refusals():
        from perturbkit.audit.report import load_report

        judgement = load_report(audit_json).check(gates)
    _print_gates(judgement)
    raise typer.Exit(judgement.exit_code)


def _audit(
    opened: Callable[[], Subject], options: dict[str, Any], only: list[str] | None, skip: list[str] | None,
    gates: Path | None, out: Path, quiet: bool, hint: str,
) -> None:  # fmt: skip
    started = time.perf_counter()
    with _refusals():
        from perturbkit.audit.request import AuditRequest
        from perturbkit.audit.runner import conduct

        request = AuditRequest(**options, out=out).selecting(tuple(only or ()), tuple(skip or ()))
        with _announced(request, quiet) as announce:
            report = conduct(opened, request, gates=gates, progress=False, announce=announce)
    if report.judgement is not None and not quiet:
        _print_gates(report.judgement)
    if report.interrupted:
        typer.echo("interrupted: the report holds what was finished", err=True)
    took = f"wrote {out / 'report.html'} in {time.perf_counter() - started:.0f} s"
    typer.echo(took + (f"   next: {hint}" if hint and not quiet else ""))
    raise typer.Exit(report.exit_code)


@contextlib.contextmanager
def _announced(request: AuditRequest, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """Show a bar with the time left on a terminal, and one line a piece of news everywhere."""
    if quiet:
        yield lambda news: None
        return
    from rich.console import Console

    # A person reads the lines: they go to standard error beside the bar, so that standard output is the path alone.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not sys.stderr.isatty():
        yield lambda news: _print_news(console, request, news)
        return
    weights: dict[str, int] = {}
    with _bar(console) as bar:
        task = bar.add_task("audit", total=None)

        def announce(news: Any) -> None:
            from perturbkit.audit.finding import Finding
            from perturbkit.audit.plan import Plan

            _print_news(console, request, news)
            if isinstance(news, Plan):
                weights.update({s.name: max(s.evaluations, 50) for s in news.sections})
                bar.update(task, total=sum(weights.values()))
            elif isinstance(news, Finding):
                bar.advance(task, weights[news.section])

        yield announce


def _print_news(console: Console, request: AuditRequest, news: Subject | Plan | Finding) -> None:
    from perturbkit.audit.finding import Finding
    from perturbkit.audit.plan import Plan

    if isinstance(news, Finding):
        colour = {"ok": "green", "weak": "yellow", "failed": "red"}.get(news.status, "dim")
        console.print(f"{news.section:<13}[{colour}]{news.status:<8}[/]", _escaped(news.why or news.headline))
    elif isinstance(news, Plan):
        took = f"{news.seconds:.0f} s" if news.seconds < 100 else f"{news.seconds / 60:.0f} min"
        sections = _counted(len(news.sections), "section")
        console.print(f"{'plan':<21}{sections}, about {news.evaluations:,} evaluations, {took}")
    else:
        rows = news.n if request.rows is None else min(news.n, request.rows)
        console.print(
            f"{'model':<21}{_escaped(news.name)}, {f'{len(news.classes):,} classes' if news.classes else 'one number a row'}"
        )
        console.print(
            f"{'data':<21}{rows:,} of {news.n:,} rows of {_escaped(news.data_name)}, seed {request.seed}"
        )


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else " " for c in text))


def _print_gates(judgement: Judgement) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    colours = {"passed": "green", "failed": "red", "inconclusive": "yellow"}
    for r in judgement.results:
        console.print(
            f"gate         [{colours[r.verdict]}]{r.verdict:<13}[/]{_escaped(r.gate.key)}: {_escaped(r.why)}"
        )


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn a refused model or data into exit code 4, an interruption into 130, an error of our own into 70."""
    from perturbkit.core.checks import DataError, ModelError, PerturbkitError

    try:
        yield
    except (ModelError, DataError) as error:
        typer.echo(f"perturbkit: {error}", err=True)
        raise typer.Exit(EXIT_REFUSED) from None
    except (typer.Exit, PerturbkitError):
        raise
    except Exception as error:
        import traceback

        traceback.print_exc()
        typer.echo(
            f"perturbkit: an error of its own, {type(error).__name__}: {error}. Please report it.", err=True
        )
        raise typer.Exit(EXIT_INTERNAL) from None
    except KeyboardInterrupt:
        typer.echo("interrupted before the first section: no report", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _number(text: str | None) -> float | None:
    """Read 0.03 or 8/255."""
    if text is None:
        return None
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(
            f"{text!r} is not a number; write for instance 0.03 or 8/255", param_hint="--eps"
        ) from None


def _bounds(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not LOW,HIGH; write for instance 0,1", param_hint="--bounds"
        ) from None
    return low, high
