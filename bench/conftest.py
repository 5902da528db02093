"""`pytest bench`: runs comparisons, shows them by pytest-benchmark, and writes all numbers into a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .common import circumstances, default_device
from .steps.compare import Row
from .steps.comparisons import Comparison, left_out_on_cpu
from .steps.machine import Machine, this_machine
from .steps.peers import FLASHOPTIM, OPTIMI, version


class Session:
    """The rows by kind, what was left out, where to write them, and the end of the time that there is."""

    def __init__(self, path: Path | None, budget: float | None) -> None:
        self._path = path
        self._circumstances = circumstances("pytest", torch.device(default_device()))
        self._circumstances["peers"] = {name: version(name) for name in (OPTIMI, FLASHOPTIM)}
        self.rows: dict[str, list[Row]] = {kind: [] for kind in KINDS}
        self.left_out = [] if torch.cuda.is_available() else left_out_on_cpu()
        self._end = None if budget is None else time.monotonic() + budget

    @property
    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def write(self) -> None:
        """What there is by now: who is stopped has lost nothing."""
        if self._path is not None:
            rows = {kind: [row.record() for row in rows] for kind, rows in self.rows.items()}
            result = self._circumstances | {"left_out": self.left_out, "rows": rows}
            self._path.write_text(json.dumps(result, indent=1) + "\n")


class Clock:
    """The clock that pytest-benchmark reads: it goes on by what was measured, and stands still otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, samples: Iterator[float]) -> None:
        self.now += next(samples)


KINDS = ["step", "pipeline", "scale"]
SESSION = pytest.StashKey[Session]()
CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--results", type=Path, metavar="JSON", help="write all numbers there, for python -m bench.report")
    group.addoption("--budget", type=float, metavar="SECONDS", help="begin no comparison after that time")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config.getoption("--results"), config.getoption("--budget"))
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line("markers", "benchmark: how pytest-benchmark shows it")
        config.pluginmanager.register(WithoutPytestBenchmark())


class WithoutPytestBenchmark:
    """Its table is missing then, the numbers are not."""

    @pytest.fixture
    def benchmark(self) -> Any:
        pytest.skip("pytest-benchmark is not installed: see the file of --results")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = sorted(filter(_is_wanted, items), key=_turn)
    for item in items:
        if _call(item):
            item.add_marker(pytest.mark.filterwarnings("default"))  # the warnings of peers are theirs
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def _call(item: pytest.Item) -> dict[str, Any]:
    """The comparison and the contender of an item; empty for a test of another kind."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params if "comparison" in params else {}


def _turn(item: pytest.Item) -> int:
    """Steps before curves, for the time may be short."""
    call = _call(item)
    return KINDS.index(call["comparison"].kind) if call else -1


def _is_wanted(item: pytest.Item) -> bool:
    call = _call(item)
    return not call or call["contender"] in call["comparison"].contenders


@pytest.fixture(scope="session")
def machine() -> Machine:
    return this_machine()


@pytest.fixture(scope="module")
def comparison(request: pytest.FixtureRequest, machine: Machine) -> dict[str, Row]:
    """The rows of a comparison by contender."""
    asked: Comparison = request.param
    session = request.config.stash[SESSION]
    calls = map(_call, request.session.items)
    wanted = {call["contender"] for call in calls if call.get("comparison") is asked}
    try:
        if session.is_over:
            pytest.skip("the time was over")
        rows = asked.run(machine, wanted)
        session.rows[asked.kind] += rows
    except (Exception, pytest.skip.Exception) as error:
        session.left_out.append(f"{asked.kind} {asked.id}: {error}")
        raise
    finally:
        session.write()
    return {row.contender: row for row in rows}


@pytest.fixture
def show(comparison: dict[str, Row], request: pytest.FixtureRequest) -> Callable[[str], None]:
    """What hands the measured times of a contender over to pytest-benchmark; each is a row of its table."""

    def show(contender: str) -> None:
        row = comparison[contender]
        if row.error is not None:
            pytest.skip(row.error)
        benchmark = request.getfixturevalue("benchmark")
        threads = f", {row.threads} threads" * (row.threads != 1)
        benchmark.group = f"{row.case}, {row.shape}, {row.dtype}{threads}"
        benchmark.extra_info.update(row.record())
        benchmark.pedantic(CLOCK.play, args=(iter(row.samples),), rounds=len(row.samples))

    return show


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash[SESSION].left_out:
        terminalreporter.write_line(f"left out: {line}")
