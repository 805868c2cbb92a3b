"""The loop that all trainers share: steps, validation, logs, checkpoints, progress."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from rich import progress
from rich.console import Console

from examples.common.config import Config
from examples.common.memory import live_bytes, peak_bytes
from examples.common.plots import draw_losses
from examples.common.run_folder import RunFolder
from examples.common.states import count_params

LOG_EVERY = 10  # steps between two looks at the losses; in between, nothing waits

Watch = Callable[[Mapping[str, Any]], str | None]


class Batches(Protocol):
    """Batches for the asking: a batch depends on the seed and on its index alone."""

    def __getitem__(self, index: int) -> Any: ...


class Result(NamedTuple):
    """What a run left.

    Attributes:
      state: the train state after the last step.
      history: a row a step: step, loss, grad_norm, and at times val_loss and others.
      summary: what summary.json holds.
    """

    state: Any
    history: list[dict[str, Any]]
    summary: dict[str, Any]


def fit(
    config: Config,
    state: Any,
    batches: Batches,
    *,
    step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    evaluate: Callable[[Any], dict[str, float]],
    test: Callable[[Any], dict[str, Any]] | None = None,
    report: Callable[[Any, Any], Any] | None = None,
    units: str,
    units_per_step: int,
    unit_of_loss: str = "nats",
    released: bool = False,
    console: Console | None = None,
    watch: Watch | None = None,
) -> Result:
    """Trains as the options say; an interrupted run that resumes repeats the whole one.

    Args:
      config: the options.
      state: the first one: anything with `params`, `opt_state` and `tx`.
      batches: batches[k] is that of step k + 1.
      step: jitted, (state, batch) -> (state, metrics); "loss" is among the metrics.
      evaluate: state -> held-out metrics, "val_loss" among them.
      test: the last state -> the summary's metrics, if the run comes to its end with
        finite weights; those of the last validation if left out.
      report: (state, batch) -> the state of numerics, for `report_every`.
      units: what the speed counts, as "tokens".
      units_per_step: how many a step takes.
      unit_of_loss: for the picture.
      released: whether steps release gradients, so that they are never all there.
      console: where progress is shown.
      watch: sees every row when it is complete; what it returns is a reason to stop.
    """
    folder, start, history = None, 0, []
    if config.out:
        folder = RunFolder(config.out, state, resume=config.resume)
    if folder and config.resume:
        start, history = folder.latest, folder.restore_log()
        state = folder.restore(state)
    stop = config.steps if config.stop_at is None else config.stop_at
    live = live_bytes(state, released=released)

    # Compiled ahead of the loop, so that the clock sees nothing but steps.
    step_fn = step.lower(state, batches[start]).compile()
    seconds, pending, clock, reason, at = 0.0, [], time.perf_counter(), None, start
    with progress_bar(console) as bar:
        task = bar.add_task(config.optimizer, total=stop, completed=start, note="")
        for at in range(start + 1, stop + 1):  # so many steps are done after this one
            state, metrics = step_fn(state, batches[at - 1])
            pending.append(metrics)
            eval_now = at % config.eval_every == 0 or at == config.steps
            save_now = at % config.save_every == 0 or at == stop
            report_now = report and config.report_every and not at % config.report_every
            if not (eval_now or save_now or report_now or at % LOG_EVERY == 0):
                continue  # without waiting for the device
            rows = [
                {"step": at - len(pending) + 1 + i} | jax.tree.map(float, found)
                for i, found in enumerate(jax.device_get(pending))
            ]
            seconds += time.perf_counter() - clock
            if eval_now:
                rows[-1] |= evaluate(state)
            if report_now:
                numerics = report(state, batches[at - 1])
                numerics.warn()  # of leaves for which the learning rate is too small
                rows[-1]["numerics"] = jax.tree.map(float, numerics)._asdict()
            history += rows
            if folder:
                folder.log(rows)
                if save_now:
                    folder.save(at, state)
            reason = why_stop(rows, watch)
            rate = (at - start) * units_per_step / seconds
            note = f"loss {rows[-1]['loss']:.3f}  {rate:,.0f} {units}/s"
            bar.update(task, completed=at, note=note)
            pending, clock = [], time.perf_counter()
            if reason:
                break

    steps = at - start
    summary = {
        "config": dataclasses.asdict(config),
        "parameters": count_params(state.params),
        "bytes": live,
        "peak_bytes": peak_bytes(live, step_fn),
        "checkpoint_bytes": folder and folder.checkpoint_bytes,
        "seconds": seconds,
        "steps": steps,
        "units": units,
        "units_per_second": steps * units_per_step / seconds if steps else None,
        **outcome(history),
        "stopped": reason,
    }
    if test:
        ended = at == config.steps and all_finite(state.params)
        summary["metrics"] = test(state) if ended else {}
    if folder:
        if history:
            title = (
                f"{config.optimizer}, {summary['parameters'] / 1e6:.1f} M parameters"
            )
            draw_losses(
                {config.optimizer: history},
                folder.path / "losses.png",
                title=title,
                unit=unit_of_loss,
            )
        folder.close(summary)
    return Result(state, history, summary)


def all_finite(tree) -> bool:
    leaves = jax.tree.leaves(jax.device_get(tree))
    return all(bool(np.isfinite(leaf).all()) for leaf in leaves)


def why_stop(rows: Sequence[Mapping[str, Any]], watch: Watch | None) -> str | None:
    """A reason to end the run after these rows; None to go on."""
    if not any(math.isfinite(row["loss"]) for row in rows):
        return f"the loss is not finite since step {rows[0]['step']} or before"
    reasons = (watch(row) for row in rows) if watch else ()
    return next(filter(None, reasons), None)


def outcome(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rows of a run come to.

    The last train losses are averaged, because the loss of a single batch is noisy.
    """
    measured = [row for row in history if "val_loss" in row]
    losses = [row["loss"] for row in history]
    norms = [row["grad_norm"] for row in history if "grad_norm" in row]
    last = losses[-20:]
    train_loss = sum(last) / len(last) if last else None
    finite = [
        math.isfinite(row["loss"]) and math.isfinite(row.get("grad_norm", 0.0))
        for row in history
    ]
    return {
        "train_loss": train_loss,
        "val_loss": measured[-1]["val_loss"] if measured else None,
        "metrics": {
            name.removeprefix("val_"): value
            for name, value in (measured[-1] if measured else {}).items()
            if name.startswith("val_") and name != "val_loss"
        },
        "gradient_norm": sum(norms) / len(norms) if norms else None,
        "nonfinite": len(finite) - sum(finite),
        # A NaN is not below the first loss either.
        "diverged": bool(losses) and not train_loss <= losses[0],
    }


def progress_bar(console: Console | None) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )
