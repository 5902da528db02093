"""Tests whose body runs in several processes at once, as the ranks of a process group over loopback.

    @on_ranks(2)
    def test_something(backend): ...  # with dist.get_rank(), collectives, meshes

The processes are started once and wait for the next test, so that torch is imported once; each test has a process
group of its own. Arguments are sent, so they must be picklable. A rank that fails, or hangs, ends all of them, and the
next test starts new ones.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=30)
TEST_TIMEOUT = 90.0
MOST_RANKS = 4


# Of pytest-xdist's: one starts the processes, which keep all cores busy.
on_one_worker = pytest.mark.xdist_group("ranks")


class RankError(AssertionError):
    """What went wrong on some rank."""


def on_ranks(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test function in this many processes; it passes if it does on all of them."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(**arguments: Any) -> None:
            if arguments.get("backend") == "triton" and 0 < torch.cuda.device_count() < count:
                pytest.skip(f"compiled kernels on {count} ranks need {count} GPUs")
            POOL.run(function.__module__, function.__qualname__, count, arguments)

        test.body = function  # type: ignore[attr-defined]
        return on_one_worker(test)

    return decorate


def run_on_ranks(count: int, function: Callable[..., None], **arguments: Any) -> None:
    """The same for a function that is a part of a test."""
    POOL.run(function.__module__, function.__qualname__, count, arguments)


def rank_device() -> torch.device:
    """Where the tensors of this rank lie: each has a GPU of its own, or none has."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


class Pool:
    """The processes."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, module: str, name: str, count: int, arguments: dict[str, Any]) -> None:
        """Call the body of a test on ranks 0 to `count` - 1."""
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self._pipes[:count]):
                pipe.send((module, name, rank, count, str(Path(folder) / "store"), arguments))
            errors = self._errors(self._pipes[:count])
        if errors:
            self.stop()
            raise RankError("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items())))

    def _errors(self, pipes: list[Any]) -> dict[int, str]:
        """The tracebacks of the first ranks that fail. Those that then wait for them are not waited for."""
        waiting = dict(zip(pipes, range(len(pipes)), strict=True))
        errors: dict[int, str] = {}
        deadline = time.monotonic() + TEST_TIMEOUT
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), deadline - time.monotonic())
            if not ready:
                missing = ", ".join(map(str, waiting.values()))
                return errors or {-1: f"no word from rank {missing} within {TEST_TIMEOUT:g} seconds"}
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "the process has died"
                if error is not None:
                    errors[rank] = error
                    deadline = min(deadline, time.monotonic() + 1)
        return errors

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "ranks"])
        for _ in range(MOST_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        self._processes, self._pipes = [], []


def _serve(pipe: Any) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="fusedopt")
    while True:
        try:
            module, name, rank, count, store, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_call(module, name, rank, count, store, arguments))


def _call(module: str, name: str, rank: int, count: int, store: str, arguments: dict[str, Any]) -> str | None:
    """The traceback of a test on this rank, None if it passes."""
    try:
        nccl = torch.cuda.is_available() and torch.cuda.device_count() >= count
        if nccl:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=dist.FileStore(store, count),
            rank=rank,
            world_size=count,
            timeout=COLLECTIVE_TIMEOUT,
        )
        function = getattr(importlib.import_module(module), name)
        getattr(function, "body", function)(**arguments)
        dist.barrier()  # nobody leaves while another may still fail
        dist.destroy_process_group()
        gc.collect()
    except BaseException:
        return traceback.format_exc()
    return None


POOL = Pool()
atexit.register(POOL.stop)
