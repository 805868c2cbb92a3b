"""One run in a process of its own: `python -m benchmarks.study.worker`.

Reads a job, one line of JSON, from its input and ends when that input closes, which it
does when the process that asked for the run dies. Prints an event, a line of JSON, now
and then. Whatever else is printed goes to the log. The record of the run is a file, so
that it is not lost if nobody is there to read it.
"""

import dataclasses
import errno
import importlib
import json
import os
import pathlib
import platform
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.study.definition import Run
from benchmarks.study.files import is_full, write_json
from benchmarks.study.records import failure, record, stop_reason

NOT_WRITTEN = 74  # EX_IOERR: the exit status of a run whose files the disk refused
EVERY = 0.5  # seconds between two events


class Job(NamedTuple):
    """A run, where its files go and what may stop it.

    Attributes:
      run: which.
      criteria: for aborting it.
      folder: of the trainer: checkpoints and metrics.
      result: the file of the record.
      log: what the run printed, for messages.
      cores: to run on; None for all.
      cache: folder of compiled programs, shared by all runs.
    """

    run: Run
    criteria: list[dict[str, Any]]
    folder: str
    result: str
    log: str
    cores: list[int] | None
    cache: str

    def to_json(self) -> str:
        return json.dumps(self._asdict() | {"run": dataclasses.asdict(self.run)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        fields = json.loads(text)
        return cls(**fields | {"run": Run(**fields["run"])})


def execute(job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
    """Trains, and writes the record; a run that fails is recorded as such.

    Raises:
      OSError: the disk is full, or refuses the record. Nothing is recorded then.
    """
    clock = time.perf_counter()
    try:
        entry = _train(job, emit, clock)
    except Exception as error:
        traceback.print_exc()
        if is_full(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        seconds = time.perf_counter() - clock
        entry = failure(job.run, f"{last} (log: {job.log})", seconds)
    write_json(pathlib.Path(job.result), entry)


def _train(job: Job, emit, clock: float) -> dict[str, Any]:
    trainer = importlib.import_module(job.run.trainer)
    emit({"machine": machine()})
    config = trainer.Config(**job.run.config)
    resume = _can_resume(job)
    config = dataclasses.replace(config, out=job.folder, resume=resume)
    told = 0.0

    def watch(row: Mapping[str, Any]) -> str | None:
        nonlocal told
        if time.perf_counter() - told > EVERY:
            told = time.perf_counter()
            emit({"step": row["step"], "steps": config.steps, "loss": row["loss"]})
        return stop_reason(job.criteria, row)

    result = trainer.train(config, watch=watch)
    seconds = time.perf_counter() - clock
    return record(job.run, result.history, result.summary, seconds)


def _can_resume(job: Job) -> bool:
    """Whether the folder holds a checkpoint of this very run; if not, it is emptied."""
    folder = pathlib.Path(job.folder)
    config = folder / "run.json"
    saved = any(path.name.isdigit() for path in folder.glob("checkpoints/*"))
    if saved and config.exists() and json.loads(config.read_text()) == job.run.config:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    write_json(config, job.run.config)
    return False


def machine() -> dict[str, Any]:
    """Where this process runs: device, platform, cores and versions."""
    import jax

    device = jax.devices()[0]
    name = _processor() if device.platform == "cpu" else device.device_kind
    return {
        "device": name,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def _end_with(stream) -> None:
    """Ends this process, at once, when the stream does."""
    stream.read()
    os._exit(1)


def main() -> None:
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    if job.cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)  # before JAX counts them for its threads

    import jax

    jax.config.update("jax_compilation_cache_dir", job.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def emit(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        execute(job, emit)
    except OSError as error:
        emit({"not_written": str(error)})
        sys.exit(NOT_WRITTEN)


if __name__ == "__main__":
    main()
