"""LaTeX becomes MathML when the site is built: no script and no font is fetched."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex makes of $...$ and of $$...$$.
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(content, page, config, files):
    def mathml(formula):
        try:
            return _mathml(html.unescape(formula[2]).strip(), formula[1] == "div")
        except ValueError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from error

    return FORMULA.sub(mathml, content)


def _mathml(latex, display):
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    mathml = convert(latex, display="block" if display else "inline")
    if "\\" in mathml:
        raise ValueError(f"latex2mathml does not know all of {latex}")
    return f'<div class="formula">{mathml}</div>' if display else mathml
