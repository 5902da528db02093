"""What `mkdocs build` does beyond Markdown: docstrings in reStructuredText, equations, no other hosts.

mkdocs.yml names this file twice. As an extension of griffe it turns what the docstrings have of reStructuredText
(equations, links, examples, names of the public interface) into Markdown. As a hook of MkDocs it writes equations,
`$...$` and `$$...$$` in pages too, as MathML, which browsers show without a script; TeX that cannot be converted, and
a page that would load something from another host, end the build with an error.
"""

import html
import re
from textwrap import dedent
from typing import Any

import griffe
from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

to_mathml = LatexToMathML(fancy_error=False).convert_with_local_state
# What arithmatex makes of dollars.
EQUATION = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
# What a browser loads by itself; a link is followed by its reader.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*\brel=["']?(?:canonical|alternate|prev|next))[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|@import|class=["']?mermaid""",
)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = {str(name) for name in pkg.exports or ()}
        self._convert(pkg, public)

    def _convert(self, obj: griffe.Object, public: set[str]) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, public)
        for member in obj.members.values():
            if not member.is_alias:
                self._convert(member, public)


def markdown(text: str, public: set[str]) -> str:
    """A docstring in Markdown: `public` are the names that become links to their own documentation."""

    def aligned(match: re.Match[str]) -> str:
        return f"$$\n\\begin{{aligned}}\n{dedent(match[1]).strip()}\n\\end{{aligned}}\n$$\n"

    def example(match: re.Match[str]) -> str:
        return f":\n\n```python\n{dedent(match[1]).strip()}\n```\n"

    text = re.sub(r"^\.\. math::\n((?: {4}.*(?:\n|\Z))+)", aligned, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r"`([^`<]+?)\s+<([^>`]+)>`_", r"[\1](\2)", text)
    text = re.sub(r"::\n\n((?: {4}.*(?:\n|\Z)|\n(?= {4}))+)", example, text)
    text = re.sub(r"^Class attributes:$", "Attributes:", text, flags=re.MULTILINE)
    return re.sub(
        r"(?<!`)`(\w+)`(?!`)",
        lambda match: f"[{match[0]}][fusedopt.{match[1]}]" if match[1] in public else match[0],
        text,
    )


def on_page_markdown(text: str, **kwargs: Any) -> str:
    """Leave out the mark of an example that tests do not run."""
    return re.sub(r"^( *```python) no-run$", r"\1", text, flags=re.MULTILINE)


def on_page_content(content: str, page: Any, **kwargs: Any) -> str:
    """Write the page's equations as MathML."""

    def mathml(match: re.Match[str]) -> str:
        tex, block = html.unescape(match["tex"]), match["tag"] == "div"
        try:
            math = to_mathml(tex, displaystyle=block)
            return f'<div class="equation">{math}</div>' if block else math
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {tex}: {error}") from error

    return EQUATION.sub(mathml, content)


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Refuse what the page would load from another host, and TeX that is left."""
    text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", output, flags=re.DOTALL)
    found = LOADED.search(output) or re.search(r"\\[a-zA-Z]{3,}|:math:", re.sub(r"<[^>]*>", "", text))
    if found:
        raise PluginError(f"{page.file.src_uri}: {found[0]!r} may not be in a page")
    return output
