"""The wheel alone: what it holds, and that every module imports from it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_only_perturbkit_at_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"perturbkit"}
    for needed in (
        "perturbkit/py.typed",
        "perturbkit/audit/templates/report.html.j2",
        "perturbkit/data/files/",
    ):
        assert any(name.startswith(needed) for name in names), needed
    source = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*") if p.is_file()}
    kept = {s for s in source if "__pycache__" not in s}
    assert kept <= set(names), sorted(kept - set(names))[:5]


def test_every_module_imports_from_a_fresh_environment(wheel, tmp_path):
    """A new environment sees the wheel, and the dependencies of this one; the source tree is out of reach."""
    import venv

    import numpy

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    # Appended by hand and not by a .pth file of this environment, whose editable install would show the source tree.
    dependencies = Path(numpy.__file__).resolve().parent.parent
    program = f"""
import importlib, pkgutil, sys
sys.path.append({str(dependencies)!r})
import perturbkit
assert perturbkit.__file__.startswith({str(site)!r}), perturbkit.__file__
n = 0
for module in pkgutil.walk_packages(perturbkit.__path__, "perturbkit."):
    if module.name.split(".")[-1] not in ("_worker", "__main__"):
        importlib.import_module(module.name)
        n += 1
for name in perturbkit.__all__:
    package = getattr(perturbkit, name)
    for public in getattr(package, "__all__", []):
        getattr(package, public)
print(n)
"""
    ran = subprocess.run(
        [str(python), "-I", "-c", program], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 60
