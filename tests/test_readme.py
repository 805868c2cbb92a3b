"""The README's quickstart runs as it stands."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_quickstart_runs(capsys):
    quickstart = README.read_text().split("## Quickstart")[1]
    blocks = re.findall(r"```python\n(.*?)```", quickstart, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "Bytes per parameter" in capsys.readouterr().out
