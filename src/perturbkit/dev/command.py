"""``perturbkit dev``: the skeletons of a method and the stubs of the lazy exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="For those who add methods to perturbkit.")


@app.command()
def new(
    place: Annotated[str, typer.Argument(metavar="PACKAGE/ROOM/METHOD", help="Where the method goes.")],
    root: Annotated[
        Path | None, typer.Option("--root", help="The checkout; default: that of this perturbkit.")
    ] = None,
) -> None:
    """Write the three files of a new method: the method, its test and its reproduction."""
    from perturbkit.dev.skeleton import write_skeleton

    for path in write_skeleton(place, root):
        typer.echo(f"wrote {path}")


@app.command()
def stubs(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a stub is stale.")
    ] = False,
) -> None:
    """Write the stubs of the lazy exports from what the modules name in ``__all__``."""
    from perturbkit.dev.stubs import stale_stubs, write_stubs

    found = stale_stubs() if check else write_stubs()
    for path in found:
        typer.echo(f"{'stale' if check else 'wrote'} {path}")
    if check and found:
        typer.echo("write them with: perturbkit dev stubs", err=True)
        raise typer.Exit(1)


@app.command()
def docs(
    out: Annotated[Path, typer.Option("--out", help="Folder of the generated pages.")] = Path(
        "docs/reference"
    ),
) -> None:
    """Write the generated pages of the site: the reference by package, and the matrix of methods."""
    from perturbkit.dev.reference import write_reference

    for path in write_reference(out):
        typer.echo(f"wrote {path}")
