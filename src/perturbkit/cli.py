"""The command line: ``perturbkit audit``, ``perturbkit papers`` and ``perturbkit dev``.

Thin: it mounts the commands of the packages, which import what is heavy only when they run.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from perturbkit._version import __version__

__all__ = ["app", "main"]

# Set before torch is loaded: threads that spin while they wait make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="perturbkit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Perturb something, measure the response, act on it: audit a model, reproduce a paper.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"perturbkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _name in ("audit", "papers", "dev"):
    if find_spec(f"perturbkit.{_name}") and find_spec(f"perturbkit.{_name}.command"):
        app.add_typer(importlib.import_module(f"perturbkit.{_name}.command").app, name=_name)


def main() -> None:
    """Run the command line; an error that perturbkit raises on purpose becomes one line and exit code 2."""
    from perturbkit.core.checks import PerturbkitError

    try:
        app()
    except PerturbkitError as error:
        typer.echo(f"perturbkit: {error}", err=True)
        sys.exit(2)
