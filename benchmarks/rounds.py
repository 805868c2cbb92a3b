"""Timing contenders side by side."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.contenders import Absent, Shapes

WARMUP_CALLS = 2
TRIAL_CALLS = 3
MAX_CALLS = 500

METHOD = f"""\
Contenders alternate: each round makes, warms up ({WARMUP_CALLS} calls), times and \
drops every one of them in turn. A timing is N calls enqueued one after another \
between two waits for the device (jax.block_until_ready, torch.cuda.synchronize), \
divided by the steps in them; N is chosen once for each contender. The figure is the \
median over rounds."""


def alternate(
    contenders: Sequence[Any],
    shapes: Shapes,
    *,
    rounds: int,
    seconds: float,
    looped: bool = False,
    deadline: float = float("inf"),
) -> dict[str, dict[str, Any]]:
    """Times all contenders on one leaf set.

    Args:
      contenders: see contenders.py.
      shapes: of the leaves.
      rounds: how often each contender is timed.
      seconds: about how long one timing takes.
      looped: time calls of a compiled loop of steps instead of single steps.
      deadline: of ``time.monotonic()``, after which no timing begins.

    Returns:
      For each name its seconds in each round, in order, with the calls of a round and
      the bytes moved; or ``{"absent": reason}``.
    """
    results: dict[str, dict[str, Any]] = {c.name: {"seconds": []} for c in contenders}
    for round_index in range(rounds):
        for contender in contenders:
            result = results[contender.name]
            if "absent" in result:
                continue
            if time.monotonic() > deadline:
                if not result["seconds"]:
                    result["absent"] = "the time allowed for the report was over"
                continue
            try:
                time_once(contender, shapes, round_index, seconds, looped, result)
            except Exception as error:  # Whatever it is, the others go on.
                result["absent"] = reason(error)
    return {
        name: {"absent": r["absent"]} if "absent" in r else r
        for name, r in results.items()
    }


def time_once(
    contender: Any,
    shapes: Shapes,
    seed: int,
    seconds: float,
    looped: bool,
    result: dict[str, Any],
) -> None:
    """One round of one contender: appends to its seconds for one step."""
    run = contender.make(shapes, seed, looped)
    try:
        timed_calls(run, WARMUP_CALLS)
        if "calls" not in result:
            trial = timed_calls(run, TRIAL_CALLS) / TRIAL_CALLS
            result["calls"] = max(TRIAL_CALLS, min(MAX_CALLS, int(seconds / trial)))
        elapsed = timed_calls(run, result["calls"])
        result["seconds"].append(elapsed / (result["calls"] * run.steps))
        if "moved_bytes" not in result:
            result["moved_bytes"] = run.moved_bytes
    finally:
        run.close()


def timed_calls(run: Any, calls: int) -> float:
    """Seconds that so many calls take, pipelined."""
    run.sync()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    run.sync()
    return time.perf_counter() - start


def median_ms(result: dict[str, Any]) -> float:
    return 1e3 * statistics.median(result["seconds"])


def reason(error: Exception) -> str:
    """An error in one line; an :class:`Absent` already is one."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, Absent):
        return lines[0]
    return f"{type(error).__name__}: {lines[0][:300]}"
