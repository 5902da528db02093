"""Kernels compiled for the CPU are kept on the disk, until anything that they come from changes."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt.engines import code_cache, compiled
from tests.engines.compiling import run, stepped
from tests.twins import bits, make_params, snapshot, train

pytest.importorskip("numba")


def test_importing_takes_no_compiler_and_a_second_process_none_either(tmp_path):
    code = """
        import sys, torch, fusedopt
        print("numba" in sys.modules, "llvmlite" in sys.modules)
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        fusedopt.SGD([param], max_grad_norm=1.0).step()
        print("numba" in sys.modules, param.tolist() != [1.0] * 4)
    """
    first, second = (run(code, FUSEDOPT_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first == ["False", "False", "True", "True"]
    assert second == ["False", "False", "False", "True"]


def test_what_is_compiled_is_kept(cache, builds):
    expected = stepped()
    assert builds == ["prepare", "update"]
    assert len(list(cache.iterdir())) == 2
    compiled._kernel.cache_clear()
    assert stepped() == expected
    assert len(builds) == 2


def test_numbers_and_sizes_compile_nothing(cache, builds):
    for size, lr in ((1, 0.1), (1000, 0.2), (70000, torch.tensor(0.3))):
        params = [Parameter(torch.ones(size)) for _ in range(3)]
        optimizer = fusedopt.SGD(params, lr=lr, weight_decay=0.1 * size)
        train(optimizer, range(2))
    assert builds == ["prepare", "update"]


def test_a_damaged_file_is_compiled_anew(cache, builds):
    expected = stepped()
    for damage in (lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]):
        for path in cache.iterdir():
            path.write_bytes(damage(path.read_bytes()))
        compiled._kernel.cache_clear()
        builds.clear()
        assert stepped() == expected
        assert builds == ["prepare", "update"]


def test_an_empty_variable_turns_the_cache_off(cache, builds, monkeypatch):
    monkeypatch.setenv(code_cache.VARIABLE, "")
    stepped()
    compiled._kernel.cache_clear()
    stepped()
    assert len(builds) == 4
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_no_error(cache, builds, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    stepped()
    assert len(builds) == 2


def test_by_default_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv(code_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert code_cache.folder() == tmp_path / "fusedopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert code_cache.folder() == tmp_path / ".cache" / "fusedopt"

    def no_home():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    assert code_cache.folder() is None


def test_any_change_of_a_rule_compiles_it_anew(cache, builds, own):
    """Of itself, of a function that it calls, of a value that it names."""
    results = [
        stepped(own(**parts))
        for parts in (
            {},
            {"factor": 3.0},
            {"helper": "x + FACTOR"},
            {"update": "return param + scalars[0] * helper(grad, 3), ()"},
            {"helper": "x + TABLE['three'][0] * math.pi"},
            {"helper": "x + TABLE['three'][0] * math.pi", "table": 3.0},
            {"helper": "x + TABLE['three'][0] * math.e", "table": 3.0},
            {},
        )
    ]
    assert builds.count("update") == 7
    assert results[0] == results[-1]
    assert len({repr(result) for result in results}) == 7


def test_a_rule_is_what_it_was_when_it_was_first_compiled(cache, builds, own, tmp_path):
    """Its file may change while the process lives: what is kept of it for others has to be what they will read."""
    cls = own(factor=2.0)
    before = stepped(cls)
    (path,) = tmp_path.glob("own_*.py")
    path.write_text(path.read_text().replace("constexpr(2.0)", "constexpr(3.0)"))
    param = Parameter(torch.arange(5.0).double())  # of another signature
    optimizer = cls([param])
    param.grad = torch.linspace(-1, 1, 5).double()
    optimizer.step()
    assert bits(param.detach().float()) == before
    compiled._kernel.cache_clear()
    assert stepped(own(factor=3.0)) != before


def test_defaults_of_helpers_count(cache):
    from fusedopt.kernels.language import triton

    def rule(factor):
        @triton.jit
        def helper(x, factor=factor):
            return x * factor

        @triton.jit
        def update(param, grad, states, scalars, STATES):
            return helper(param), ()

        return update

    assert code_cache.key_of("update", {"UPDATE": rule(2.0)}) != code_cache.key_of("update", {"UPDATE": rule(3.0)})


def test_a_file_that_cannot_be_linked_is_compiled_anew(cache, builds):
    expected = stepped()
    for path in cache.iterdir():
        content = path.read_bytes()[32:]
        content = content[: len(content) // 2]
        path.write_bytes(hashlib.sha256(content).digest() + content)
    compiled._kernel.cache_clear()
    builds.clear()
    assert stepped() == expected
    assert builds == ["prepare", "update"]
    compiled._kernel.cache_clear()
    assert stepped() == expected
    assert builds == ["prepare", "update"]


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code_cache.os, "replace", full)
    stepped()
    assert list(cache.iterdir()) == []


def test_what_takes_long_is_told_once(cache, caplog, monkeypatch):
    monkeypatch.setattr(compiled, "_seconds", 0.0)
    monkeypatch.setattr(compiled.time, "perf_counter", iter(range(100)).__next__)
    with caplog.at_level(logging.WARNING, "fusedopt"):
        stepped()
        stepped(fusedopt.Lion)
    (message,) = caplog.messages
    assert re.fullmatch(f"fusedopt has spent 1.0 s on compiling .* They are kept in {cache} .*", message)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_warmup_compiles_and_writes_nothing(cache, builds, options):
    optimizer = fusedopt.Adam(make_params(), **options)
    before = snapshot(optimizer)
    fusedopt.warmup(optimizer)
    assert snapshot(optimizer) == before
    assert set(builds) == {"prepare", "update"} | {"sum_squares" for _ in options}
    builds.clear()
    train(optimizer, range(1))
    assert builds == []
