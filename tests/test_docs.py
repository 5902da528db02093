"""The code of the documentation runs, every optimizer has its page, and links lead somewhere."""

import re
from pathlib import Path

import pytest

import fusedopt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAV = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
OPTIMIZERS = sorted(
    set(fusedopt.__all__)
    - {"FusedOptimizer", "warmup", "step_in_backward", "register_functional_optim", "full_state_dict", "muon_groups"}
)
FENCE = re.compile(r"^```(\S*)(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """The blocks of Python in a page: what follows the language, the code, and the line where it begins."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == "python":
            yield match[2].strip(), match[3], text.count("\n", 0, match.start(3))


def is_rule(code):
    return "@triton.jit" in code and "class " not in code


def with_code(pages):
    return [page for page in pages if any(True for _ in blocks(page))]


@pytest.mark.parametrize("page", with_code(PAGES), ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    """From top to bottom in one namespace. The rule of a kernel is its source, word by word."""
    source = ""
    sources = [path.read_text() for path in (ROOT / "kernels").rglob("*.py")]
    for mark, code, line in blocks(page):
        assert mark in ("", "no-run"), f"{name(page)}:{line}: unknown mark {mark!r}"
        if mark == "no-run":
            compile("\n" * line + code, page, "exec")
        elif is_rule(code):
            assert any(code in source for source in sources), f"{name(page)}:{line}: this rule is not in kernels/"
        else:
            source += "\n" * (line - source.count("\n")) + code  # so that errors tell the line in the page
    if "import triton" in source:
        pytest.importorskip("triton")
    script = tmp_path / f"{page.stem}.py"  # where Triton finds the source of a kernel
    script.write_text(source)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, script, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_links_lead_to_files(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}, which is not there"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_has_a_page(optimizer):
    page = f"optimizers/{optimizer.lower()}.md"
    assert page in NAV
    assert f"\n::: fusedopt.{optimizer}\n" in (DOCS / page).read_text()


def test_rest_of_the_interface_is_told():
    api = (DOCS / "api.md").read_text()
    for public in set(fusedopt.__all__) - {*OPTIMIZERS, "muon_groups"}:  # which stands beside Muon
        assert f"\n::: fusedopt.{public}\n" in api


def test_nav_has_every_page():
    assert len(NAV) == len(set(NAV))
    assert set(NAV) >= {str(page.relative_to(DOCS)) for page in PAGES}
    assert all((DOCS / page).exists() for page in NAV)


def test_page_tells_the_row_of_the_table():
    """What a page says of states and bytes stands in the table of all optimizers too."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (\d+) \| ", (DOCS / "optimizers/index.md").read_text(), re.MULTILINE)
    for optimizer in OPTIMIZERS:
        listed = {(states, moved) for classes, states, moved in rows if f"[`{optimizer}`]" in classes}
        page = (DOCS / f"optimizers/{optimizer.lower()}.md").read_text()
        told = set(re.findall(r"^\| (?:[^|]* \| )?([^|]*) \| (\d+) \| ", page, re.MULTILINE))
        assert told == listed, optimizer


def test_citation_tells_the_version():
    assert f"\nversion: {fusedopt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
