"""What of a benchmark's runs is kept in git: a compact JSON, one run on a line.

Raw runs, with their curves, lie below ``runs/``, which git ignores. Results in
``benchmarks/results`` hold what tables and docs say, and the command that makes them.
"""

import json
import math
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs"
DIGITS = 6
WIDEST = 1500
"""Characters of a line."""


def write(path: pathlib.Path, content: Any) -> None:
    """Writes JSON of few lines, numbers rounded to six digits.

    Args:
      path: of the file; its folder is made.
      content: for ``json.dumps``. What nests two levels deep or less is on one line,
        if that is not too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(_rounded(content), "") + "\n")


def without(runs: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Runs without some of their entries, such as their curves."""
    return [{k: x for k, x in run.items() if k not in names} for run in runs]


def _text(content: Any, indent: str) -> str:
    line = json.dumps(content)
    if _depth(content) <= 2 and len(line) <= WIDEST:
        return line
    deeper = indent + " "
    if isinstance(content, dict):
        entries = [f"{json.dumps(k)}: {_text(x, deeper)}" for k, x in content.items()]
        first, last = "{}"
    else:
        entries, (first, last) = [_text(x, deeper) for x in content], "[]"
    body = ",\n".join(deeper + entry for entry in entries)
    return f"{first}\n{body}\n{indent}{last}"


def _depth(content: Any) -> int:
    """How many containers lie in each other."""
    if not isinstance(content, dict | list | tuple):
        return 0
    inside = content.values() if isinstance(content, dict) else content
    return 1 + max(map(_depth, inside), default=0)


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(x) for key, x in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(x) for x in content]
    if isinstance(content, float) and math.isfinite(content):
        return float(f"{content:.{DIGITS}g}")
    return content
