"""What docs and READMEs show is so: Python runs and prints it, commands exist.

Every ```python block of a page runs, in order and in one namespace; a ```text block
after it is what it prints. Another framework's Python, to compare with, is fenced as
```py title="PyTorch" and does not run.
"""

import doctest
import importlib.util
import pathlib
import re
import shlex
import tomllib
import types
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_flash

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for pattern in ("*.md", "docs/**/*.md", "examples/*/README.md")
    for path in sorted(ROOT.glob(pattern))
}
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A page leaves out what does not matter: "..." stands for anything.
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page):
    text = PAGES[page]
    found = [
        Block(match[1], match[2], text.count("\n", 0, match.start(2)))
        for match in FENCE.finditer(text)
    ]
    assert 2 * len(found) == text.count("```"), "a fence is indented or not closed"
    return found


def pages_with(language):
    return [page for page in PAGES if f"```{language}" in PAGES[page]]


def quick_first(pages):
    """Pages to run: those that people see first, and in the full tier the others."""
    first = ("README.md", "docs/index.md")
    return [p if p in first else pytest.param(p, marks=pytest.mark.full) for p in pages]


def given(page):
    """The README begins in the middle of a program."""
    if page != "README.md":
        return {}
    model = nn.Dense(64)
    params = model.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
    return {"optax": optax, "optax_flash": optax_flash} | locals()


@pytest.mark.parametrize("page", quick_first(pages_with("python")))
def test_python_runs(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = given(page)
    printed = None
    for language, text, line in blocks(page):
        if language == "python":
            # Empty lines, so that errors name the page's lines.
            exec(compile("\n" * line + text, ROOT / page, "exec"), names)
            printed = capsys.readouterr().out
        elif language == "text":
            assert printed is not None, f"{page}:{line}: nothing has run that prints"
            check = doctest.OutputChecker().check_output(text, printed, FLAGS)
            assert check, f"{page}:{line}: printed is\n{printed}"


@pytest.mark.parametrize("page", pages_with("py"))
def test_what_does_not_run_is_of_another_framework(page):
    assert {b.language for b in blocks(page) if b.language.startswith("py")} <= {
        "python",
        'py title="PyTorch"',
    }
    for block in blocks(page):
        if block.language.startswith("py "):
            assert not re.search(r"\b(jax|optax)", block.text), block.line


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            for word in words[1:]:
                name, assigns, _ = word.partition("=")
                found = rf"^{re.escape(name)}{' [?]=' if assigns else ':'}"
                assert re.search(found, makefile, re.M), command
        elif words[0] in ("python", "python3"):
            module = words[1] == "-m"
            script = script_of_module(words[2]) if module else ROOT / words[1]
            assert script.exists(), command
            check_options(script, words[2 + module :])


def commands(page):
    """Lines of bash blocks and indented blocks, and code within sentences."""
    text = PAGES[page].replace("\\\n", " ")
    bash = "\n".join(match[2] for match in FENCE.finditer(text) if match[1] == "bash")
    text = FENCE.sub("", text)
    lines = bash.splitlines() + re.findall(r"^    (\S.*)$", text, re.M)
    lines += re.findall(r"`([^`\n]+)`", text)
    return [
        line.strip()
        for line in lines
        if re.match(r"(make|python3?) [\w.]|python -m", line.strip())
    ]


def script_of_module(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin, name
    path = pathlib.Path(spec.origin)
    return path.with_name("__main__.py") if path.name == "__init__.py" else path


def check_options(script, words):
    """Each --option of ours is named in the script, its folder or the common one."""
    if not script.is_relative_to(ROOT) or ".venv" in script.parts:
        return
    folders = (script.parent, ROOT / "examples/common")
    source = "".join(p.read_text() for f in folders for p in f.glob("*.py"))
    for option in re.findall(r"--([\w-]+)", " ".join(words)):
        field = option.removeprefix("no-").replace("-", "_")
        assert f"--{option}" in source or re.search(rf"\b{field}\b", source), option


@pytest.mark.parametrize("page", PAGES)
def test_extras_and_files_exist(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:optax_flash|\.)\[([a-z0-9,]+)\]\"", PAGES[page]):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras
    folders = "tests|benchmarks|examples|optax_flash|docs"
    for path in re.findall(rf"[` ]((?:{folders})/[\w/.-]*\w)", PAGES[page]):
        assert (ROOT / path).exists(), path
    if not page.startswith("docs/"):  # Those of docs/ are checked by make docs.
        for link in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", PAGES[page]):
            assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize(
    "module", [optax_flash, optax_flash.flax, optax_flash.plan, optax_flash.release]
)
def test_the_api_is_whole(module):
    pages = "".join(PAGES[page] for page in PAGES if page.startswith("docs/api/"))
    shown = re.findall(rf"^::: {module.__name__}\.(\w+)$", pages, re.MULTILINE)
    assert len(shown) == len(set(shown))
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    # Older names of what is shown stay importable.
    older = {name for name in public if re.search(rf"`{name}`.* older name", pages)}
    assert set(shown) == public - older
