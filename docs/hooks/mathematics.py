"""LaTeX becomes MathML when the site is built: no script and no font is fetched."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and of $$...$$.
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(content, page, config, files):
    return FORMULA.sub(_mathml, content)


def _mathml(formula):
    latex = html.unescape(formula[2]).strip()
    if formula[1] == "span":
        return convert(latex)
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    return f'<div class="formula">{convert(latex, display="block")}</div>'
