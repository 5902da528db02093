"""`python -m bench.tune`, on a GPU that is not there."""

import sys

import pytest
import torch

import fusedopt.kernels.multi_tensor
from bench.steps.compare import Setting
from bench.steps.comparisons import case_of
from bench.steps.shapes import Shape
from bench.tune import cli as tune
from bench.tune.cli import Choice
from fusedopt.engines import signature, tables
from fusedopt.engines.signature import Signature
from tests.bench.fake_gpu import fake_machine

SETTING = Setting(case_of("AdamW"), Shape("tiny", ((3000,),)), torch.float32)


@pytest.fixture
def launched(monkeypatch):
    """(block size, chunk size, threads, module of `load`) of the updates that were launched; all take place."""
    record = set()
    launch = tables.launch

    def recorded(kernel, programs, *args, **options):
        if "CHUNK_SIZE" in options:
            module = kernel.fn.__globals__["load"].fn.__module__
            record.add((options["BLOCK_SIZE"], options["CHUNK_SIZE"], 32 * options["num_warps"], module))
        launch(kernel, programs, *args, **options)

    monkeypatch.setattr(tables, "launch", recorded)
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)
    return record


def test_every_choice_is_launched_and_what_is_in_force_stays(launched, device):
    before = tune.in_force(SETTING), Signature.tiling, signature.THREADS, fusedopt.kernels.multi_tensor
    choices = [Choice(1024, 1, 128), Choice(2048, 2, 256)]
    trials = tune.tune(SETTING, choices, ("", "evict_first"), fake_machine(device))
    hints = "bench.tune.hinted_loads"
    plain = {(1024, 1024, 128, "fusedopt.kernels.rounding"), (2048, 4096, 256, "fusedopt.kernels.rounding")}
    assert plain < launched
    assert launched - plain in ({(1024, 1024, 128, hints)}, {(2048, 4096, 256, hints)})
    assert [trial.choice.hint for trial in trials].count("evict_first") == 1
    assert [trial.share_of_copy for trial in trials] == sorted((t.share_of_copy for t in trials), reverse=True)
    assert before == (tune.in_force(SETTING), Signature.tiling, signature.THREADS, fusedopt.kernels.multi_tensor)
    lines = tune.table(trials).splitlines()
    assert len(lines) == 4
    assert sum("evict_first" in line for line in lines) == 1


def test_what_is_in_force_comes_back_after_an_error():
    before = Signature.tiling, signature.THREADS, fusedopt.kernels.multi_tensor
    with pytest.raises(KeyError), tune.chosen(Choice(512, 1, 256, "evict_last")):
        raise KeyError
    assert before == (Signature.tiling, signature.THREADS, fusedopt.kernels.multi_tensor)


def test_a_choice_that_steps_wrongly_is_an_error(device, monkeypatch):
    monkeypatch.setattr(tables, "launch", lambda *args, **options: None)
    with pytest.raises(AssertionError, match="it is not torch's"):
        tune.attempt(SETTING, Choice(1024, 1, 128), fake_machine(device))


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune"])
    assert tune.main() == 2
    assert capsys.readouterr().err == "python -m bench.tune: error: there is no GPU to tune for\n"
