"""The wheel and the sdist hold what they should, and the wheel works where nothing else of the project is."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fusedopt

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "fusedopt", "kernels"]


def python(*arguments, cwd):
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packed, beside directories that must stay out."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    for name in ("tests", "bench"):
        (copy / name).mkdir()
        (copy / name / "__init__.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


def modules(folder):
    paths = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    return {path for path in paths if not path.startswith("fusedopt/kernels/")}  # the link that `make gpu` makes


def test_wheel_contents(wheel):
    assert wheel.name == f"fusedopt-{fusedopt.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"fusedopt-{fusedopt.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"fusedopt", info}
    assert "fusedopt/py.typed" in names
    assert {name for name in names if not name.startswith(info)} == {
        "fusedopt/py.typed",
        *modules("fusedopt"),
        *(f"fusedopt/{name}" for name in modules("kernels")),
    }


def test_installed_wheel(wheel, tmp_path):
    target = tmp_path / "target"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel]
    python("-m", "pip", *install, cwd=tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import fusedopt, fusedopt.kernels.rules.adam as kernel
print(fusedopt.__file__, kernel.__file__)
print(callable(fusedopt.Adam), hasattr(kernel, "update"), hasattr(kernel, "scalars"))
"""
    where, works = python("-I", "-c", code, cwd=tmp_path).splitlines()
    assert all(str(target) in path for path in where.split())
    assert works == "True True True"


def test_sdist_contents_and_the_wheel_made_from_it(source, wheel, tmp_path):
    code = f"import setuptools.build_meta as build; print(build.build_sdist({str(tmp_path)!r}))"
    python("-c", code, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # in older Pythons' later versions
        archive.extractall(tmp_path, **safely)
    assert modules("kernels") <= names
    assert (
        modules("fusedopt")
        | {
            "fusedopt/py.typed",
            "setup.py",
            "README.md",
        }
        <= names
    )

    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    code = f"import setuptools.build_meta as build; build.build_wheel({str(tmp_path)!r})"
    python("-c", code, cwd=unpacked)
    with zipfile.ZipFile(tmp_path / wheel.name) as again, zipfile.ZipFile(wheel) as first:
        assert sorted(again.namelist()) == sorted(first.namelist())


def test_what_the_tests_need_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("test = ")]
    assert "setuptools" in line, "the wheel is built without isolation"
    assert Path(ROOT / "fusedopt" / "py.typed").exists()
