"""Fixtures of the tests of what is compiled for the CPU."""

import pytest

from fusedopt.engines import code_cache, compiled
from tests.engines.compiling import PLAIN, RULE
from tests.own_rule import own_class


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled kernels, in a process that has none."""
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path / "cache"))
    compiled._kernel.cache_clear()
    yield tmp_path / "cache"
    compiled._kernel.cache_clear()


@pytest.fixture
def builds(monkeypatch):
    """The kernels that have been compiled, by their names."""
    from fusedopt.kernels.cpu import build

    names, object_code = [], build.object_code
    monkeypatch.setattr(build, "object_code", lambda name, *args: names.append(name) or object_code(name, *args))
    return names


@pytest.fixture
def own(tmp_path):
    """A class of one's own from a file, with parts of its rule replaced."""

    def make_class(**parts):
        path = tmp_path / f"own_{len(list(tmp_path.iterdir()))}.py"
        return own_class(path, RULE.format(**{**PLAIN, **parts}))

    return make_class
