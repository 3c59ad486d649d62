"""``perturbkit audit``: plan and run audits, judge saved ones by gates, and compare them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from perturbkit.audit.compare import AuditComparison
    from perturbkit.audit.finding import Finding
    from perturbkit.audit.gates import Judgement
    from perturbkit.audit.plan import Plan
    from perturbkit.audit.report import Report
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

Budget = Annotated[
    str | None, typer.Option(help="Stop measuring after this time, as 90s or 10m.", show_default=False)
]
Baseline = Annotated[
    Path | None,
    typer.Option(help="audit.json to compare with; worse beyond noise is exit code 1.", show_default=False),
]
Format = Annotated[
    str | None, typer.Option("--format", help="What to write, as html,json,csv,junit,md.", show_default="all")
]
Log = Annotated[str | None, typer.Option(help="Log the audit: mlflow or wandb.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the audit that was stopped in --out.")]
Cluster = Annotated[
    str | None,
    typer.Option(help="Dask scheduler, tcp://HOST:PORT, whose workers run it.", show_default=False),
]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML file of arguments.", show_default="audit.toml, where MODEL is left out"),
]
Model = Annotated[
    str | None,
    typer.Argument(
        help="module:function; .pt2, .onnx or .skops; a Hugging Face folder or hf:name; predictions.csv.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Argument(help=".csv, .parquet, .npz, .jsonl or a folder of images by class.", show_default=False),
]
Task = Annotated[str | None, typer.Option(help="image, tabular or text.", show_default="told from the data")]
Label = Annotated[
    str | None, typer.Option(help="Column of the label.", show_default="label, y, target or class")
]
Groups = Annotated[str | None, typer.Option(help="Column of the group of a row.", show_default=False)]
Frozen = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of a table that no attack, proof or damage changes; may be repeated.", show_default=False
    ),
]
Bounds = Annotated[str | None, typer.Option(help="Range of inputs, as 0,1.", show_default="0,1 for images")]

# 70 is what sysexits.h calls an internal error; 1 would say that a gate failed.
EXIT_REFUSED, EXIT_INTERNAL, EXIT_INTERRUPTED = 4, 70, 130


@app.command()
def demo(
    ctx: typer.Context,
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
    baseline: Baseline = None,
    budget: Budget = None,
    memory: Memory = None,
    device: Device = None,
    out: Out = Path("audit"),
    format_: Format = None,
    log: Log = None,
    resume: Resume = False,
    cluster: Cluster = None,
    quiet: Quiet = False,
) -> None:
    """Audit a bundled model on bundled data."""
    _audit(_Call(_named(ctx) | {"demo": kind}), "perturbkit audit run MODEL DATA")


@app.command()
def run(
    ctx: typer.Context,
    model: Model = None,
    data: Data = None,
    config: Config = None,
    task: Task = None,
    label: Label = None,
    groups: Groups = None,
    frozen: Frozen = None,
    bounds: Bounds = None,
    profile: Profile = "quick",
    n: Rows = None,
    seed: Seed = 0,
    only: Only = None,
    skip: Skip = None,
    norm: Norm = "linf",
    eps: Eps = None,
    alpha: Alpha = 0.1,
    gates: Gates = None,
    baseline: Baseline = None,
    budget: Budget = None,
    memory: Memory = None,
    device: Device = None,
    out: Out = Path("audit"),
    format_: Format = None,
    log: Log = None,
    resume: Resume = False,
    cluster: Cluster = None,
    quiet: Quiet = False,
) -> None:
    """Audit a model of your own: MODEL and DATA, or a file of arguments (audit.toml in this folder, or --config).

    Exit codes: 0 every gate passed (none set: finished), 1 a gate failed or a number is worse than the baseline, 2
    usage, 3 a gated quantity could not be measured, 4 model or data refused, 70 an error of perturbkit's own, 130
    interrupted (a partial report is written).
    """
    _audit(_Call.of(ctx, model, config), "")


@app.command()
def plan(
    ctx: typer.Context,
    model: Model = None,
    data: Data = None,
    config: Config = None,
    task: Task = None,
    label: Label = None,
    groups: Groups = None,
    frozen: Frozen = None,
    bounds: Bounds = None,
    profile: Profile = "quick",
    n: Rows = None,
    seed: Seed = 0,
    only: Only = None,
    skip: Skip = None,
    norm: Norm = "linf",
    eps: Eps = None,
    alpha: Alpha = 0.1,
    budget: Budget = None,
    memory: Memory = None,
    device: Device = None,
) -> None:
    """Say what an audit would do and cost, without doing it: a few rows are timed, nothing is measured or written."""
    call = _Call.of(ctx, model, config)
    with _refusals():
        from perturbkit.audit.plan import make_plan, memory_needed, substitutions
        from perturbkit.audit.runner import choose_rows

        request = call.request()
        subject = choose_rows(call.opened(), request)
        planned = make_plan(subject, request)
        _print_plan(
            subject, request, planned, substitutions(subject, request), memory_needed(subject, planned)
        )


@app.command()
def init(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="As for run.")],
    data: Data = None,
    task: Task = None,
    label: Label = None,
    groups: Groups = None,
    frozen: Frozen = None,
    bounds: Bounds = None,
    profile: Profile = "quick",
    seed: Seed = 0,
    device: Device = None,
    memory: Memory = None,
    file: Annotated[Path, typer.Option(help="File to write.")] = Path("audit.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Open model and data once, and write a commented file of arguments, audit.toml, for perturbkit audit run."""
    call = _Call(_named(ctx))
    with _refusals():
        from perturbkit.audit.config import template
        from perturbkit.audit.plan import make_plan
        from perturbkit.audit.runner import choose_rows
        from perturbkit.core import checks

        if file.exists() and not force:
            raise checks.ArgumentError(
                f"{file} exists; allowed: a new file. Name another with --file, or replace it with --force."
            )
        subject = call.opened()
        request = call.request()
        text = template(
            model, data, call.given, subject, make_plan(choose_rows(subject, request), request), file.parent
        )
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise checks.ArgumentError(
                f"{file} cannot be written ({error.strerror}); allowed: a file in a folder of yours. Choose another."
            ) from error
    next_ = "perturbkit audit run" + ("" if file == Path("audit.toml") else f" --config {file}")
    typer.echo(f"wrote {file}   next: {next_}")


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="audit.json of the older audit.")],
    new: Annotated[Path, typer.Argument(help="audit.json of the newer one.")],
    every: Annotated[
        bool, typer.Option("--all", help="List every number, not only those that changed.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write the comparison, as .html or .json.", show_default=False)
    ] = None,
) -> None:
    """Say which numbers of two audits changed by more than both their intervals allow.

    Exit codes: 0 nothing got worse beyond noise, 1 something did or is no longer measured, 2 usage, 4 a file refused.
    """
    with _refusals():
        from perturbkit.audit.compare import read_both
        from perturbkit.audit.writers import save_comparison

        found = read_both(old, new)
        if out is not None:
            save_comparison(found, out)
    _print_comparison(found, every)
    if out is not None:
        typer.echo(f"wrote {out}")
    raise typer.Exit(found.exit_code)


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


class _Call:
    """The arguments of a command: those given, of a file and of the command line, and how they are understood."""

    def __init__(self, given: dict[str, Any], locked: dict[str, Any] | None = None) -> None:
        self.given, self.locked = given, locked or {}

    @classmethod
    def of(cls, ctx: typer.Context, model: str | None, config: Path | None) -> _Call:
        """Put the command line before the file: that of ``--config``, or ``audit.toml`` where no model is named."""
        from perturbkit.audit.config import NAME, read_config
        from perturbkit.core import checks

        given = _named(ctx)
        given.pop("config", None)
        path = config
        if path is None and model is None:
            path = Path(NAME)
            if not path.exists():
                raise checks.ArgumentError(
                    f"no MODEL is given and there is no {NAME} in this folder; allowed: MODEL DATA, or a file of arguments. "
                    "Write one with perturbkit audit init MODEL DATA, or try perturbkit audit demo."
                )
            if ctx.info_name == "run" and not given.get("quiet"):
                typer.echo(f"{'arguments':<21}{path}", err=True)
        if path is None:
            return cls(given)
        filed = read_config(path)
        locked = filed.pop("locked", None)
        if model is not None:
            filed.pop("data", None)
            filed.pop("demo", None)
        call = cls({**filed, **given}, locked)
        if "model" not in call.given and "demo" not in call.given:
            raise checks.ArgumentError(
                f'{path} names no model; allowed: model = "..." in the file, or MODEL on the command line. Add one.'
            )
        return call

    def get(self, key: str, default: Any = None) -> Any:
        value = self.given.get(key)
        return default if value is None else value

    def request(self) -> AuditRequest:
        from perturbkit.audit.request import AuditRequest, parse_duration

        budget = self.get("budget")
        request = AuditRequest(
            task=self.get("task"), profile=self.get("profile", "quick"), n=self.get("n"), seed=self.get("seed", 0),
            norm=self.get("norm", "linf"), eps=_number(self.get("eps")), alpha=float(self.get("alpha", 0.1)),
            bounds=_bounds(self.get("bounds")), device=self.get("device"), memory=self.get("memory"),
            out=Path(self.get("out", "audit")), budget=None if budget is None else parse_duration(budget),
            frozen=tuple(self.get("frozen", ())),
        )  # fmt: skip
        return request.selecting(tuple(self.get("only", ())), tuple(self.get("skip", ())))

    def options(self) -> dict[str, Any]:
        """Return what opens the subject beside model and data."""
        shared = {"memory": self.get("memory"), "device": self.get("device")}
        if self.get("demo"):
            return shared
        own = {"task": self.get("task"), "label": self.get("label"), "group": self.get("groups")}
        return {**own, "bounds": _bounds(self.get("bounds")), **shared}

    def opened(self) -> Subject:
        if self.get("demo"):
            from perturbkit.audit.demo import demo_subject

            return demo_subject(self.get("demo"), **self.options())
        from perturbkit.audit.context import frozen_columns
        from perturbkit.audit.opening import open_subject

        subject = open_subject(self.get("model"), self.get("data"), **self.options())
        frozen_columns(subject, self.request())
        return subject

    def formats(self) -> list[str] | None:
        value = self.get("format")
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    def source(self) -> dict[str, Any]:
        """Return the arguments as a file holds them, for the lock: neither where it ran nor where it wrote."""
        left_out = ("out", "resume", "quiet", "log", "cluster")
        found = {k: str(v) if isinstance(v, Path) else v for k, v in self.given.items() if k not in left_out}
        if found.get("bounds") is not None:
            found["bounds"] = list(_bounds(found["bounds"]) or ())
        if found.get("format") is not None:
            found["format"] = self.formats()
        return {"profile": "quick", "seed": 0, **found}


def _named(ctx: typer.Context) -> dict[str, Any]:
    """Return the arguments that were given on the command line."""
    given = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        if value is not None and source is not None and not source.name.startswith("DEFAULT"):
            given[name.rstrip("_")] = value
    return {k: v for k, v in given.items() if k not in ("kind", "file", "force")}


def _audit(call: _Call, hint: str) -> None:
    started, quiet, log = time.monotonic(), bool(call.get("quiet")), call.get("log")
    out = Path(call.get("out", "audit"))
    with _refusals():
        from perturbkit.audit.runner import conduct
        from perturbkit.audit.writers import FORMATS
        from perturbkit.core import checks

        request, formats = call.request(), call.formats()
        for name in formats or ():
            checks.one_of("format", name, FORMATS)
        elsewhere = None
        if log is not None:
            from perturbkit.audit.logging_ import require_log

            require_log(log)
        if call.get("cluster"):
            from perturbkit.audit.remote import on_cluster

            named = call.get("demo") or call.get("model")
            elsewhere = on_cluster(
                call.get("cluster"), named, call.get("data"), call.options(), demo=bool(call.get("demo"))
            )
        with _announced(request, quiet) as announce:
            report = conduct(
                call.opened, request, gates=call.get("gates") or None, baseline=call.get("baseline"), formats=formats,
                resume=bool(call.get("resume")), started=started, elsewhere=elsewhere, source=call.source(),
                progress=False, announce=announce,
            )  # fmt: skip
        if log is not None:
            from perturbkit.audit.logging_ import log_report

            where = log_report(report, out, log)
            if not quiet:
                typer.echo(f"{'logged':<21}{where}", err=True)
    if not quiet:
        _print_end(report, call.locked)
    if report.interrupted:
        typer.echo("interrupted: the report holds what was finished; --resume goes on", err=True)
    first = report.saved[0] if report.saved else out
    took = f"wrote {first} in {time.monotonic() - started:.0f} s"
    typer.echo(took + (f"   next: {hint}" if hint and not quiet else ""))
    raise typer.Exit(report.exit_code)


def _print_end(report: Report, locked: dict[str, Any]) -> None:
    """Print where the time went, what differs from a lock file, the comparison and the gates."""
    from perturbkit.audit.config import differences

    inside, total = report.times["inside"], sum(v for k, v in report.times.items() if k != "inside")
    typer.echo(f"{'time':<21}{inside:.0f} of {total:.0f} s in the model and its certificate", err=True)
    for line in differences(locked, report):
        typer.echo(f"{'lock':<21}{line}", err=True)
    if report.comparison is not None:
        _print_comparison(report.comparison, False, err=True)
    if report.judgement is not None:
        _print_gates(report.judgement)


def _print_comparison(found: AuditComparison, every: bool, err: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    # Off a terminal nothing says how wide a line may be: no number is cut.
    terminal = (sys.stderr if err else sys.stdout).isatty()
    console = Console(stderr=err, highlight=False, soft_wrap=True, width=None if terminal else 160)
    changes = found.changes if every else found.beyond_noise
    for note in found.notes:
        console.print(_escaped(f"note: {note}"))
    if changes:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("number", "before", "now", "difference", "verdict"):
            table.add_column(name, no_wrap=True)
        colours = {"worse": "red", "lost": "red", "better": "green", "changed": "yellow"}
        for c in changes:
            old, new = ("not measured" if m is None else m.text for m in (c.old, c.new))
            shown = "" if c.old is None or c.new is None else f"{c.difference:+.3g}"
            colour = colours.get(c.verdict, "dim")
            table.add_row(_escaped(c.key), _escaped(old), _escaped(new), shown, f"[{colour}]{c.verdict}[/]")
        console.print(table)
    console.print(
        f"{len(found.beyond_noise)} of {len(found.changes)} numbers changed beyond noise, {len(found.worse)} for the worse"
    )


def _print_plan(
    subject: Subject,
    request: AuditRequest,
    planned: Plan,
    notes: dict[str, str],
    memory: tuple[int, int, str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    what = f"{len(subject.classes):,} classes" if subject.classes else "one number a row"
    console.print(f"{'model':<13}{_escaped(subject.name)}, {what}, task {subject.task}")
    console.print(f"{'data':<13}{subject.n:,} rows of {_escaped(subject.data_name)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("section")
    for name in ("rows", "evaluations", "time"):
        table.add_column(name, justify="right")
    for s in planned.sections:
        if s.refusal:
            table.add_row(s.name, "-", "-", "not run")
        else:
            table.add_row(
                s.name, f"{s.rows:,}", f"{s.evaluations:,}", _duration(s.evaluations * planned.each)
            )
    table.add_row("in all", "", f"{planned.evaluations:,}", _duration(planned.seconds))
    console.print(table)
    weights, batch, how = memory
    console.print(f"{'memory':<13}weights {_size(weights)}, one batch {_size(batch)} ({how})")
    if request.budget is not None:
        fits = planned.seconds <= request.budget
        console.print(
            f"{'budget':<13}{_duration(request.budget)}: "
            + (
                "enough"
                if fits
                else "not enough for all of this; sections would measure fewer rows and say so"
            )
        )
    for name, why in notes.items():
        console.print(f"{name:<13}{_escaped(why)}")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 or seconds == 0 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(n: int) -> str:
    return (
        f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{max(n, 1) / 1e6:.0f} MB" if n >= 5e5 else f"{n / 1e3:.0f} kB"
    )


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
        took = _duration(news.seconds)
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
    except (typer.Exit, typer.BadParameter, PerturbkitError):
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


def _number(text: str | float | None) -> float | None:
    """Read 0.03 or 8/255."""
    if text is None or not isinstance(text, str):
        return text
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(
            f"{text!r} is not a number; write for instance 0.03 or 8/255", param_hint="--eps"
        ) from None


def _bounds(text: str | Sequence[float] | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in (text.split(",") if isinstance(text, str) else text))
    except (ValueError, TypeError):
        raise typer.BadParameter(
            f"{text!r} is not LOW,HIGH; write for instance 0,1", param_hint="--bounds"
        ) from None
    return low, high
