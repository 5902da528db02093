"""Imports run one way, for annotations and within functions too: CONTRIBUTING.md, "Where things are"."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import its own modules and what lies on the floors below it.
FLOORS = [
    ["tests"],
    ["bench"],
    ["tests.cases"],
    ["fusedopt.textbook"],
    ["fusedopt"],
    ["fusedopt.rules", "fusedopt.backward", "fusedopt.functional", "fusedopt.warming", "fusedopt.full_state"],
    ["fusedopt.optimizer"],
    ["fusedopt.declaration", "fusedopt.stepper"],
    ["fusedopt.plan"],
    ["fusedopt.matrices"],
    ["fusedopt.engines"],
    ["fusedopt.step"],
    ["fusedopt.storage"],
    ["fusedopt.options"],
    ["fusedopt.protocol"],
    ["fusedopt.kernels.rules"],
    ["fusedopt.kernels"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Who imports them.
WITH_KERNELS = (
    *("tests", "bench", "fusedopt.matrices", "fusedopt.engines"),
    *("fusedopt.kernels.rules", "fusedopt.kernels"),
)
UNLISTED = ("__init__.py", "__pycache__", "py.typed")


def module_of(path):
    """The dotted name of a file, and the package that its relative imports start from."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fusedopt")
    package = ".".join(parts[:-1])
    return (package if parts[-1] == "__init__" else ".".join(parts)), package


def sources():
    """The text and the package of every module, by its name."""
    paths = [path for folder in ("fusedopt", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    found = {}
    for path in paths:
        if (ROOT / "fusedopt" / "kernels") not in path.parents:  # the link that `make gpu` makes
            name, package = module_of(path)
            found[name] = path.read_text(), package
    return found


@cache
def imports(text, package, names):
    """The modules that a text imports, as far as they are this project's."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {name if (name := f"{base}.{alias.name}") in names else base for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("import_module", "__import__"):
            found |= {part.value.rstrip(".") for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
    return {name for name in found if name.partition(".")[0] in ("fusedopt", "kernels", "bench", "tests")}


def room_of(name):
    """The longest of the rooms' names that a module's begins with; None for one that belongs nowhere."""
    rooms = [room for room in FLOOR_OF if name == room or (room != "fusedopt" and name.startswith(f"{room}."))]
    return max(rooms, key=len, default=None)


def is_wrong(mine, theirs):
    """Whether a module of one room may not import a module of another."""
    if None in (mine, theirs):
        return True
    if theirs.startswith("fusedopt.kernels") and mine not in WITH_KERNELS:
        return True
    return mine != theirs and FLOOR_OF[mine] >= FLOOR_OF[theirs]


def wrong_arrows(modules):
    """What is wrong with the imports of these modules, a line each."""
    names = frozenset(modules)
    arrows = {name: imports(text, package, names) - {name} for name, (text, package) in modules.items()}
    lines = [
        f"{name} imports {other}"
        for name, found in arrows.items()
        for other in sorted(found)
        if is_wrong(room_of(name), room_of(other))
    ]
    lines += [f"{name} has no room" for name in modules if room_of(name) is None]
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        lines.append("circle: " + " → ".join(error.args[1]))
    return lines


def test_every_import_goes_down():
    modules = sources()
    some = ("fusedopt", "fusedopt.rules.adam", "fusedopt.step.entry", "fusedopt.kernels.rules.adam", "bench.common")
    assert modules.keys() >= {*some, "tests.test_arrows"}
    assert wrong_arrows(modules) == []


PLANTED = [
    ("fusedopt.step.entry", "if TYPE_CHECKING:\n    from ..optimizer import Group", "imports fusedopt.optimizer"),
    ("fusedopt.step.entry", "from ..kernels import multi_tensor", "imports fusedopt.kernels.multi_tensor"),
    ("fusedopt.step.gate", "def late():\n    from ..engines import tables", "imports fusedopt.engines.tables"),
    ("fusedopt.step.gate", "import_module('fusedopt.plan')", "imports fusedopt.plan"),
    ("fusedopt.storage.rounding", "import fusedopt.step.layout", "imports fusedopt.step.layout"),
    ("fusedopt.protocol", "from .options import option", "imports fusedopt.options"),
    ("fusedopt.kernels.gate", "from ..options import option", "imports fusedopt.options"),
    ("fusedopt.kernels.gate", "from .rules.adam import update", "imports fusedopt.kernels.rules.adam"),
    ("fusedopt.engines.tables", "from kernels import gate", "imports kernels"),
    ("fusedopt.rules.adam", "from .. import step_in_backward", "imports fusedopt"),
    ("fusedopt.rules.adam", "from ..kernels.rules import adam", "imports fusedopt.kernels.rules.adam"),
    ("fusedopt.rules.adam", "import tests.cases", "imports tests.cases"),
    ("bench.common", "from tests.oracle import exact", "imports tests.oracle"),
    ("fusedopt.storage.dtypes", "from .averaging import EMA", "circle: "),
    ("fusedopt.attic", "", "has no room"),
]


@pytest.mark.parametrize(("name", "line", "complaint"), PLANTED)
def test_a_wrong_arrow_is_seen(name, line, complaint):
    modules = sources()
    text, package = modules.get(name, ("", "fusedopt"))
    modules[name] = f"{text}\n{line}\n", package
    assert any(complaint in found for found in wrong_arrows(modules))


def test_the_map_has_a_line_for_each_folder():
    """The map in CONTRIBUTING.md names all that lies directly in fusedopt, kernels and bench, and nothing else."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].split("```")[1]
    listed, top = set(), ""
    for line in text.splitlines():
        if line and not line.startswith("   "):
            name = line.split()[0]
            top = top if line.startswith(" ") else name
            listed.add(name if top == name else top + name)
    there = {"fusedopt/", "kernels/", "bench/", "docs/", "tests/"}
    for folder in ("fusedopt", "kernels", "bench"):
        children = [path for path in (ROOT / folder).iterdir() if path.name not in UNLISTED and not path.is_symlink()]
        there |= {f"{folder}/{path.name}{'/' * path.is_dir()}" for path in children}
    assert listed == there
