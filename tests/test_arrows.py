"""Imports run one way, for annotations and within functions too: CONTRIBUTING.md, "Where things are"."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import its own modules and what lies on the floors below it.
FLOORS = [
    ["tests", "bench"],
    ["fusedopt.textbook"],
    ["fusedopt"],
    ["fusedopt.rules", "fusedopt.backward", "fusedopt.warming"],
    ["fusedopt.optimizer"],
    ["fusedopt.declaration", "fusedopt.stepper"],
    ["fusedopt.plan"],
    ["fusedopt.engines"],
    ["fusedopt.step"],
    ["fusedopt.storage"],
    ["fusedopt.options"],
    ["fusedopt.protocol"],
    ["fusedopt.kernels"],
]
UNLISTED = ("__init__.py", "__pycache__", "py.typed")
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path):
    """The dotted name of a file, and the package that its relative imports start from."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fusedopt")
    package = ".".join(parts[:-1])
    return (package if parts[-1] == "__init__" else ".".join(parts)), package


def sources():
    """The text and the package of every module, by its name."""
    paths = [path for folder in ("fusedopt", "kernels") for path in (ROOT / folder).rglob("*.py")]
    found = {}
    for path in paths:
        if (ROOT / "fusedopt" / "kernels") not in path.parents:  # the link that `make gpu` makes
            name, package = module_of(path)
            found[name] = path.read_text(), package
    return found


def imports(text, package, names):
    """The modules that a text imports: those of `names`, and whatever else has a room."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in names else base)
    return {name for name in found if room_of(name)}


def room_of(name):
    """The longest of the rooms' names that a module's begins with."""
    rooms = [room for room in FLOOR_OF if name == room or (room != "fusedopt" and name.startswith(f"{room}."))]
    return max(rooms, key=len, default=None)


def wrong_arrows(modules):
    """What is wrong with the imports of these modules, a line each."""
    arrows = {name: imports(text, package, modules) - {name} for name, (text, package) in modules.items()}
    lines = [f"{name} has no room" for name in modules if room_of(name) is None]
    for name, found in arrows.items():
        for other in sorted(found):
            mine, theirs = room_of(name), room_of(other)
            if mine and mine != theirs and FLOOR_OF[mine] >= FLOOR_OF[theirs]:
                lines.append(f"{name} imports {other}")
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        lines.append("circle: " + " → ".join(error.args[1]))
    return lines


def test_every_import_goes_down():
    modules = sources()
    assert {"fusedopt", "fusedopt.rules.adam", "fusedopt.step.entry", "fusedopt.kernels.rules.adam"} <= modules.keys()
    assert wrong_arrows(modules) == []


PLANTED = [
    (
        "fusedopt.step.entry",
        "if TYPE_CHECKING:\n    from ..optimizer import FusedOptimizer",
        "imports fusedopt.optimizer",
    ),
    ("fusedopt.step.gate", "def late():\n    from ..engines import tables", "imports fusedopt.engines.tables"),
    ("fusedopt.storage.rounding", "import fusedopt.step.layout", "imports fusedopt.step.layout"),
    ("fusedopt.protocol", "from .options import option", "imports fusedopt.options"),
    ("fusedopt.kernels.gate", "from ..options import option", "imports fusedopt.options"),
    ("fusedopt.rules.adam", "from .. import step_in_backward", "imports fusedopt"),
    ("fusedopt.rules.adam", "import tests.cases", "imports tests.cases"),
    ("fusedopt.storage.dtypes", "from .averaging import EMA", "circle: "),
    ("fusedopt.attic", "", "has no room"),
]


@pytest.mark.parametrize(("name", "line", "complaint"), PLANTED, ids=[name for name, _, _ in PLANTED])
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
    there = {"fusedopt/", "kernels/", "bench/", "tests/"}
    for top in ("fusedopt", "kernels", "bench"):
        children = [path for path in (ROOT / top).iterdir() if path.name not in UNLISTED and not path.is_symlink()]
        there |= {f"{top}/{path.name}{'/' * path.is_dir()}" for path in children}
    assert listed == there
