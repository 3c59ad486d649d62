"""Run every comparison and print one table: ``python -m benchmarks [PART OF A NAME ...]``.

A comparison is a module ``benchmarks/PACKAGE/OURS_vs_PEER.py`` with a ``main()`` that prints and returns its rows. One
whose peer is not installed says so, and the rest go on.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from perturbkit.core.checks import MissingExtraError


def main(wanted: list[str]) -> int:
    """Run what is wanted; return the number of comparisons that could not be run."""
    here, missing = Path(__file__).parent, 0
    for path in sorted(here.glob("*/*_vs_*.py")):
        name = f"{path.parent.name}.{path.stem}"
        if wanted and not any(part in name for part in wanted):
            continue
        print(f"\n{name}", flush=True)
        try:
            importlib.import_module(f"benchmarks.{name}").main()
        except (ModuleNotFoundError, MissingExtraError) as error:
            missing += 1
            print(f"  not run: {error}. Install the peers with: pip install -c constraints.txt -e '.[bench]'")
    return missing


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) and len(sys.argv) == 1 else 0)
