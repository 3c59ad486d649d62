"""Importing is cheap: what a user waits for before anything happens."""

import resource
import subprocess
import sys

HEAVY = "{'torch', 'matplotlib', 'numpy', 'scipy', 'pandas', 'sklearn', 'jinja2'} & set(sys.modules)"


def _seconds(*arguments: str) -> float:
    """Processor time of a fresh interpreter: what it takes on a machine that does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _best(limit: float, seconds, tries: int = 12) -> float:
    """Return the best of several, fewer once one is within the limit: other work on the machine only adds."""
    best = float("inf")
    for _ in range(tries):
        best = min(best, seconds())
        if best < limit:
            break
    return best


def test_import_takes_less_than_100_ms_beyond_the_interpreter():
    bare = min(_seconds("-c", "pass") for _ in range(3))
    assert _best(0.1, lambda: _seconds("-c", "import perturbkit") - bare) < 0.1


def test_help_answers_in_less_than_400_ms():
    assert _best(0.4, lambda: _seconds("-m", "perturbkit", "--help")) < 0.4


def test_nothing_heavy_is_imported():
    for code in (
        "import perturbkit",
        "import perturbkit.cli",
        "import perturbkit; dir(perturbkit); perturbkit.papers",
    ):
        check = f"import sys; {code}; assert not {HEAVY}, {HEAVY}"
        subprocess.run([sys.executable, "-c", check], check=True)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from perturbkit.cli import app\n"
        "try: app(['papers', '--help'])\nexcept SystemExit: pass\n"
        f"assert not {HEAVY}, {HEAVY}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
