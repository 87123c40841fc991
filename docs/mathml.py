"""Equations as MathML, written into the page: browsers draw it without a script or a download."""

import html
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def render(latex: str, display: str) -> str:
    # latex2mathml knows `align*`, which means the same inside a displayed equation.
    markup = convert(re.sub(r"\{(aligned|split|align)\}", "{align*}", latex), display=display)
    unknown = re.search(r"<m[a-z]+>(&|\\[a-zA-Z]+)</m[a-z]+>", markup)
    if unknown:
        raise ValueError(f"no MathML for {unknown[1]} in {latex}")
    markup = markup.replace(r"\_", "_")
    # Bars touch what they enclose; a browser would space them as a relation.
    return re.sub(r"<mo([^>]*)>(&#x0007C;|&#x02016;)", r'<mo\1 lspace="0" rspace="0">\2', markup)


def inline(self, node):
    self.body.append(render(node.astext(), "inline"))
    raise SkipNode


def block(self, node):
    r"""A displayed equation; \tag{5} puts (5) at its right."""
    latex = re.sub(r"\\(label|nonumber)(\{[^}]*\})?", "", node.astext())
    tag = re.search(r"\\tag\{([^}]*)\}", latex)
    number = f'<span class="number">({html.escape(tag[1])})</span>' if tag else ""
    latex = re.sub(r"\\tag\{[^}]*\}", "", latex)
    self.body.append(f'<div class="equation"><div>{render(latex, "block")}</div>{number}</div>\n')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline, None), block_renderers=(block, None)
    )
