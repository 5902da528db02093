"""The stopwatches of the benchmarks, with a fake clock and a fake GPU."""

import pytest

from bench.timing import LEAST_ROUNDS, EventStopwatch, Spread, Work, host_stopwatch, interleaved
from tests.bench.fake_gpu import FakeGpu


class FakeClock:
    """Time passes only where something says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def work(self, name, *durations):
        """A work that takes these seconds, one after the other, and 100 to prepare."""
        left = list(durations)

        def run():
            self.log.append(name)
            self.now += left.pop(0)

        def prepare():
            self.now += 100

        return Work(run, prepare)

    def wait(self):
        self.now += 1000


def test_spread():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(1.0, 3.0, 4.6, 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_works_have_turns_and_only_they_are_timed():
    clock = FakeClock()
    works = {"a": clock.work("a", 50, 1, 2, 50, 3, 4), "b": clock.work("b", 60, 10, 20, 60, 30, 40)}
    times = interleaved(works, host_stopwatch(clock.wait, clock), rounds=2, repeats=2)
    assert clock.log == list("aaabbb" + "bbbaaa")
    assert times == {"a": [1, 2, 3, 4], "b": [10, 20, 30, 40]}


@pytest.mark.parametrize(("seconds", "rounds"), [(0, LEAST_ROUNDS), (3600, 2 * LEAST_ROUNDS)])
def test_no_round_begins_when_the_time_is_over(seconds, rounds):
    """But for some, which a median needs."""
    clock = FakeClock()
    works = {"a": clock.work("a", *range(1000)), "b": clock.work("b", *range(1000))}
    times = interleaved(works, host_stopwatch(clock.wait, clock), 2 * LEAST_ROUNDS, seconds=seconds)
    assert [len(samples) for samples in times.values()] == [rounds, rounds]


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def stopwatch(gpu):
    """The device is kept busy for 100 µs at a time."""
    return EventStopwatch(lambda: gpu.Event(enable_timing=True), gpu.work(1e-6, 100e-6), most=64)


@pytest.mark.parametrize("host", [1e-6, 500e-6, 3e-3])
def test_only_the_device_is_timed(gpu, stopwatch, host):
    """Launches in two halves, between which the device would wait for a slow host."""
    half = gpu.work(host, 20e-6)

    def step():
        half()
        half()

    stopwatch.settle(Work(step))
    assert stopwatch(step) == pytest.approx(40e-6 + 1e-6, abs=2e-6)
    assert not stopwatch.waited(step)


def test_a_call_that_waits_is_told(gpu, stopwatch):
    def step():
        gpu.work(10e-6, 20e-6)()
        gpu.synchronize()
        gpu.work(500e-6, 20e-6)()

    stopwatch.settle(Work(step))
    assert stopwatch(step) > 500e-6
    assert stopwatch.waited(step)


def test_settling_prepares_each_time(gpu, stopwatch):
    log = []
    step = gpu.work(300e-6, 20e-6)
    stopwatch.settle(Work(lambda: log.append("step") or step(), lambda: log.append("prepare")))
    assert log == ["prepare", "step"] * 3  # with a head start of 1, 2 and 4 times 100 µs
