"""`python -m bench.static`: what it reads from machine code, and what it says of it. test_compile.py compiles."""

import json
import sys

import pytest
import torch

from bench.static import cli as static
from bench.static.assembly import MachineCode
from bench.static.kernels import Prepare, updates_of
from bench.static.report import READING, _report, markdown
from bench.static.targets import TARGETS
from fusedopt.engines import signature
from tests.cases import CASES

UPDATES = {kernel.id: kernel for kernel in updates_of(CASES)}
SGD = UPDATES["sgd-fp16"]  # 8 elements of a thread: two loads and a store of 16 bytes

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R9, desc[UR4][R8.64] ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R12, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/              @P0 BRA 0x70 ;
        /*0060*/                   CALL.REL.NOINC 0xf0 ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/              @!P1 BRA 0x20 ;
        /*0090*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00a0*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*00b0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00c0*/              @!P1 BRA 0x90 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
"""
AMDGCN = """
sgd_update:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:
	global_load_dwordx4 v[0:3], v8, s[2:3]
	global_load_dwordx4 v[4:7], v8, s[4:5]
	v_fma_f32 v0, v0, v4, v5 ; a comment
	global_store_dwordx4 v8, v[0:3], s[2:3]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.Lfunc_end0:
"""


@pytest.fixture(autouse=True)
def blocks_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(signature, "triton_interprets", lambda: False)


def report(text=SASS, kernel=SGD, target="sm_90", **numbers):
    usage = {"registers": 40, "local_bytes": 0, "shared_bytes": 0} | numbers
    return _report(kernel, TARGETS[target], MachineCode(target, "a_name", text, threads=128, **usage))


def test_what_is_read_from_sass():
    """Counted by hand: 7 instructions before the branch back, one of them the call for rare values."""
    found = report()
    assert found.waste == []
    assert found.loops == [{"load 16": 2, "store 16": 1}, {"load 2": 2, "store 2": 1}]
    loop = found.element_loop
    assert (loop.elements, loop.bytes_loaded, loop.bytes_stored, loop.declared_bytes) == (8, 4, 2, 6)
    assert (loop.instructions, loop.fast_instructions) == (7 / 8, 6 / 8)
    assert (loop.table_loads, loop.spills) == (0, 0)


def test_what_is_read_from_amdgcn():
    found = report(AMDGCN, target="gfx942")
    assert found.waste == []
    assert found.loops == [{"load 16": 2, "store 16": 1}]
    assert found.element_loop.instructions == 5 / 8


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("LDG.E.128 R12", "LDG.E.64 R12", "moves 5 bytes an element, not 6"),
        ("LDG.E.128 R12", "LDG.E.64 R12", "has accesses {'load 8': 1, 'load 16': 1, 'store 16': 1}"),
        ("FFMA R4, R4, R5, R6", "LDG.E.128 R16, desc[UR4][R6.64]", "moves 8 bytes an element, not 6"),
        ("FFMA R4, R4, R5, R6", "LDG.E R5, desc[UR4][R8.64]", "reads tables for every block"),
        ("FFMA R4, R4, R5, R6", "LDC R5, c[0x0][0x210]", "reads tables for every block"),
        ("FFMA R4, R4, R5, R6", "FMNMX R4, R4, R5, !PT", "has maxima that drop NaN"),
        ("FFMA R4, R4, R5, R6", "BAR.SYNC.DEFER_BLOCKING 0x0", "waits at 1 barriers"),
    ],
)
def test_what_is_wrong_is_told(before, after, complaint):
    assert any(complaint in each for each in report(SASS.replace(before, after)).waste)


def test_spills_and_shared_memory_are_told():
    assert report(local_bytes=8).waste == ["spills 8 bytes, but not in the loop"]
    assert report(SASS.replace("FFMA R4, R4, R5, R6", "LDL R4, [R1]"), local_bytes=8).waste == ["spills 8 bytes"]
    assert report(shared_bytes=4096).waste == ["converts layouts through 4096 bytes of shared memory"]


def test_too_many_instructions_are_told():
    """The budget of 6 bytes on an H200 is 46.5 an element, hence 371 in the loop of eight."""
    add = "        /*0040*/                   FADD R4, R4, R5 ;\n"
    line = "        /*0040*/                   FFMA R4, R4, R5, R6 ;\n"
    assert report(SASS.replace(line, 365 * add)).waste == []
    assert report(SASS.replace(line, 370 * add)).waste == ["has 47 instructions an element, more than 46"]


def test_maxima_that_keep_nan_are_no_waste():
    assert report(SASS.replace("FFMA R4, R4, R5, R6", "FMNMX.NAN R4, R4, R5, !PT")).waste == []


def test_a_kernel_without_elements_has_no_loop():
    found = report(kernel=Prepare(SGD, False), shared_bytes=32)
    assert found.element_loop is None
    assert found.loops == found.waste == []


def test_budget_of_the_gpus_that_are_named():
    """On an H200, of 132 processors and 4.3 TB/s, about 7.8 for each byte: 218 for Adam in fp32."""
    per_byte = TARGETS["sm_90"].instructions_per_byte
    assert per_byte == pytest.approx(132 * 128 * 1.98e9 / 4.3e12, rel=0.01)
    assert round(28 * per_byte) == pytest.approx(218, abs=2)


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "programs"),
    [
        ("sm_90", 32, 0, 16),  # of 128 threads: all that there is room for
        ("sm_90", 33, 0, 12),  # 40 registers: 12 warps in each of the four parts
        ("sm_90", 64, 0, 8),
        ("sm_90", 72, 0, 7),
        ("sm_90", 128, 0, 4),
        ("sm_90", 255, 0, 2),
        ("sm_90", 32, 100 << 10, 2),
        ("sm_80", 32, 100 << 10, 1),
        ("gfx942", 64, 0, 16),  # of 2 warps
        ("gfx942", 65, 0, 14),
        ("gfx942", 128, 0, 8),
        ("gfx942", 256, 0, 4),
        ("gfx942", 64, 30 << 10, 2),
    ],
)
def test_occupancy(target, registers, shared_bytes, programs):
    """As the makers' calculators have it."""
    assert TARGETS[target].occupancy(registers, shared_bytes, 128) == programs * 128 / 2048


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the program on two kernels whose machine code is invented: (exit status, stdout, stderr)."""
    kernels = [SGD, Prepare(SGD, False)]
    monkeypatch.setattr(static, "all_kernels", lambda: kernels)
    monkeypatch.setattr(static, "why_impossible", lambda: None)
    texts = {"sm_90": SASS, "gfx942": AMDGCN}

    def invented(pairs, jobs):
        return iter([report(texts[target], kernel, target) for kernel, target in reversed(pairs)])

    monkeypatch.setattr(static, "reports_of", invented)

    def run(*arguments):
        targets = ["--target", "sm_90", "--target", "gfx942"]
        monkeypatch.setattr(static, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", ["static", *targets, *arguments])
        return static.main(), *capsys.readouterr()

    return run


def test_files_are_written(run, tmp_path):
    status, printed, _ = run()
    assert status == 0
    text = (tmp_path / "static.md").read_text()
    assert printed.startswith(text)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| sgd")]
    assert rows == [["sgd-fp16", "4 + 2", "16", "16", "1 (2%), 40, 75%", "1 (1%), 40, 100%"]]
    result = json.loads((tmp_path / "static.json").read_text())
    assert [(each["kernel"], each["target"]) for each in result["reports"]] == [
        ("sgd-fp16", "sm_90"), ("prepare-sgd", "sm_90"), ("sgd-fp16", "gfx942"), ("prepare-sgd", "gfx942")
    ]  # fmt: skip
    assert result["reports"][0]["element_loop"]["bytes_loaded"] == 4
    assert result["targets"]["sm_90"]["gpu"] == "H200"
    assert {"commit", "date", "command", "triton"} <= result.keys()


def test_some_kernels_are_printed_only(run, tmp_path):
    status, printed, _ = run("-k", "prepare")
    assert status == 0
    assert "prepare-sgd" in printed
    assert "sgd-fp16" not in printed
    assert not list(tmp_path.iterdir())


def test_some_kernels_have_files_of_their_own(run, tmp_path):
    assert run("-k", "prepare", "--out", str(tmp_path))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"static-prepare.json", "static-prepare.md"}
    result = json.loads((tmp_path / "static-prepare.json").read_text())
    assert {each["kernel"] for each in result["reports"]} == {"prepare-sgd"}


def test_no_such_kernel_is_an_error(run):
    assert run("-k", "adamw9") == (2, "", "python -m bench.static: error: no kernel's name contains 'adamw9'\n")


def test_an_interpreter_cannot_compile(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["static"])
    monkeypatch.setattr(static, "triton_interprets", lambda: True)
    assert static.main() == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_waste_is_in_the_report():
    found = [report(SASS.replace("LDG.E.128 R12", "LDG.E.64 R12")), report(AMDGCN, target="gfx942", local_bytes=8)]
    text = markdown(found, "On paper.")
    assert "- sgd-fp16 for sm_90 moves 5 bytes an element, not 6, has accesses" in text
    assert "- sgd-fp16 for gfx942 spills 8 bytes, but not in the loop" in text
    summary = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "0 of 1" in summary["sm_90"]
    assert "1 of 1" in summary["gfx942"]


def test_every_kernel_of_the_cases_is_reported():
    """One `update` for each rule, set of states and dtypes; one `sum_squares` a dtype; two `prepare` a rule."""
    kernels = static.all_kernels()
    ids = [kernel.id for kernel in kernels]
    assert len(set(ids)) == len(ids)
    assert {f"sum_squares-{dtype}" for dtype in ("fp64", "fp32", "bf16", "fp16")} <= set(ids)
    for case in CASES:
        optimizer = case.make([torch.zeros(1)])
        states = [name for name in optimizer.states if optimizer.uses(name, optimizer.param_groups[0])]
        rule = "-".join([optimizer.kernel, *states])
        for dtypes in ("fp64", "bf16-fp32states", "bfloat16-rounding=stochastic"):
            same = {"bf16-fp32states": "bf16", "bfloat16-rounding=stochastic": None}.get(dtypes)
            assert f"{rule}-{dtypes}" in ids or f"{rule}-{same}" in ids, (rule, dtypes)
        assert f"prepare-{optimizer.kernel}-hyper_tensors" in ids
    assert all(target.gpu in READING for target in TARGETS.values())
