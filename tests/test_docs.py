"""The code in docs runs as it stands, and prints what the page shows."""

import doctest
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
# A page leaves out what does not matter: "..." stands for anything.
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize(
    "page, count",
    [
        ("adafactor.md", 5),
        ("checkpoints.md", 8),
        ("kernels.md", 2),
        ("low_rank_adam.md", 1),
        ("numerics.md", 2),
        ("plan.md", 2),
        ("release.md", 3),
        ("sharding.md", 3),
        ("tame.md", 1),
    ],
)
def test_page_runs(page, count, capsys):
    text = (DOCS / page).read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) == count == text.count("```python")
    assert text.count("```text") == sum(bool(shown) for _, shown in blocks)
    names: dict[str, object] = {}
    for block, shown in blocks:
        exec(block, names)
        printed = capsys.readouterr().out
        assert doctest.OutputChecker().check_output(shown, printed, FLAGS), printed
