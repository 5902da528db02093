"""Threads that step different models at the same time."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from fusedopt.engines import tables
from tests.twins import BACKENDS, bits, make, make_params, params_of, train

NAMES = ["SGD", "Adam", "Adagrad", "RMSprop", "Muon"]
STEPS = 5


@pytest.fixture
def switching():
    """Give every thread its turn as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def trained(name, backend, begin=lambda: None):
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True}
    optimizer = make(name, make_params(torch.float32, name), lr=0.1, backend=backend, **options)
    begin()
    train(optimizer, range(STEPS))
    return list(map(bits, params_of(optimizer)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attempt", range(3))
def test_steps_at_the_same_time_are_those_of_one_after_the_other(backend, attempt, switching):
    expected = [trained(name, backend) for name in NAMES]
    barrier = Barrier(len(NAMES))
    with ThreadPoolExecutor(len(NAMES)) as pool:
        futures = [pool.submit(trained, name, backend, barrier.wait) for name in NAMES]
        assert [future.result() for future in futures] == expected


def test_compiled_launches_wait_for_nobody(monkeypatch):
    monkeypatch.setattr(tables, "triton_interprets", lambda: False)
    programs = []
    with tables._interpreter:
        tables.launch({(3,): lambda **options: programs.append(options)}, 3, enable_fp_fusion=True)
    assert programs == [{"enable_fp_fusion": True}]
