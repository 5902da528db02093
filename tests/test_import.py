"""What importing costs, and life without Triton. Each test has a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.twins import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]


def run(code, **environment):
    """The lines that the code prints; it may write nothing to stderr, and a warning is an error."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FUSEDOPT_DEBUG")}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import torch\n" + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**inherited, **environment},
    )
    assert ran.stderr == ""
    assert ran.returncode == 0
    return ran.stdout.splitlines()


def test_the_import_is_quiet_and_light():
    code = """
        import sys
        before = set(sys.modules)
        import fusedopt
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print("triton" in sys.modules, "torch._dynamo" in sys.modules, "fusedopt.kernels" in sys.modules)
        print(sorted(new - set(sys.stdlib_module_names)))
    """
    assert run(code) == ["False False False", "['fusedopt']"]


# torch imports Triton too, at its optimizers' first call, and takes no other error than ImportError.
MISSING = {
    "absent": "sys.modules['triton'] = None",
    "broken": """
        class Broken:
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ImportError("DLL load failed")
        sys.meta_path.insert(0, Broken)
    """,
}


@pytest.mark.xdist_group("without Triton")  # what is compiled without it is compiled once
@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_without_triton(missing):
    code = f"""
import sys
{textwrap.dedent(missing)}
import logging
import fusedopt
print(len(fusedopt.__all__) > 0)
logging.getLogger("fusedopt").setLevel(logging.ERROR)  # compiling may take a while
for name in {OPTIMIZERS}:
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    given = dict(momentum=0.9) if name == "SGD" else {{}}
    mine = getattr(fusedopt, name)(params[:1], **given)
    loop = dict(foreach=False) if name != "Muon" else {{}}
    theirs = getattr(torch.optim, name)(params[1:], **loop, **given)
    for step in range(3):
        for optimizer, param in zip((mine, theirs), params):
            param.grad = torch.tensor([[1.0, -2.0], [0.5, float(step)]])
            optimizer.step()
    near = dict(rtol=0, atol=2e-5) if name == "Muon" else {{}}  # updates of 1e-3 that bf16 has multiplied
    torch.testing.assert_close(*params, **near)
    assert "backend: compiled ('auto' asked for)" in repr(mine)
    assert not hasattr(sys.modules.get("triton"), "jit")
    try:
        getattr(fusedopt, name)(params, backend="triton")
    except RuntimeError as error:
        print(error)
"""
    printed = run(code)
    assert printed[0] == "True"
    assert printed[1:] == ["backend='triton' needs Triton, which is not installed; 'auto' runs without it"] * len(
        OPTIMIZERS
    )
