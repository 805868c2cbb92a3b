"""Works off the runs of a study, each in a process of its own.

A run that fails, diverges or is killed is recorded and the others go on. What is
compared runs side by side (see `definition`), each run on cores of its own. The memory
that an allocator reports is one run's alone; what was compiled is shared through JAX's
cache.
"""

import fcntl
import json
import os
import pathlib
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any, BinaryIO

from rich.console import Console

from benchmarks.study.definition import Run, Study
from benchmarks.study.display import Display
from benchmarks.study.records import failure
from benchmarks.study.results import Results, ResultsError, count, differing
from benchmarks.study.worker import NOT_WRITTEN, Job

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 10  # seconds that a run has to end when it is told to


class NotWritten(OSError):
    """The disk refused something. What it says goes to the user."""


class Process:
    """A run that is going on."""

    def __init__(self, job: Job, worker: int):
        self.job, self.worker = job, worker
        self.started = time.perf_counter()
        self.not_written: str | None = None
        self._log = open(job.log, "wb")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(_paths())},
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )
        assert self._child.stdin and self._child.stdout
        self.events: BinaryIO = self._child.stdout  # type: ignore[assignment]
        os.set_blocking(self.events.fileno(), False)
        self._partial = b""
        try:
            self._child.stdin.write(job.to_json().encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it died at once: its log says why

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Events since the last call, and whether the process has closed its output."""
        ended = False
        while True:
            data = self.events.read(65536)
            if data is None:
                break
            if not data:
                ended = True
                break
            self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        return [json.loads(line) for line in lines if line], ended

    def wait(self) -> int:
        code = self._child.wait()
        self._close()
        return code

    def stop(self) -> None:
        """Ends the process, with force if need be."""
        self._child.terminate()
        try:
            self._child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._close()

    def _close(self) -> None:
        assert self._child.stdin
        for file in (self._child.stdin, self.events, self._log):
            try:
                file.close()
            except OSError:
                pass  # the log on a full disk, the input of a dead process


class Runner:
    """The runs of a study on this machine.

    Args:
      study: what to run.
      results: what there is, and where the rest is added.
      work: folder of checkpoints, logs and records.
      console: for the display.
    """

    def __init__(
        self, study: Study, results: Results, work: pathlib.Path, console: Console
    ):
        self._study, self._results = study, results
        self._work, self._console = work.absolute(), console
        self._cores = _shares(study.workers)

    def run(self, pending: Iterable[Run]) -> None:
        """Makes these runs.

        Raises:
          NotWritten: the disk is full; what was finished before is kept.
          ResultsError: another machine made the earlier runs.
          KeyboardInterrupt: after the end of all processes.
        """
        self._work.mkdir(parents=True, exist_ok=True)
        with (self._work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResultsError(
                    f"another process runs this study: it holds {lock.name}"
                ) from None
            self._adopt(pending := list(pending))
            done = {(e["model"], e["condition"], e["seed"]) for e in self._results.runs}
            pending = [
                run
                for run in pending
                if (run.model, run.condition, run.seed) not in done
            ]
            if pending:
                self._work_off(pending)

    def _adopt(self, pending: list[Run]) -> None:
        """Takes records that an interrupted call could not take."""
        for run in pending:
            path = self._result(run)
            if not path.exists():
                continue
            entry = json.loads(path.read_text())
            if entry["status"] == "failed" or differing(entry["config"], run):
                path.unlink()
                continue
            self._add(run, entry)

    def _work_off(self, pending: list[Run]) -> None:
        title, total = self._study.content["title"], len(self._study.runs)
        finished = len(self._results.runs)
        workers = len(self._cores)
        going: list[Process] = []
        with (
            Display(self._console, title, total, finished, workers) as display,
            selectors.DefaultSelector() as selector,
        ):
            try:
                while pending or going:
                    self._start(pending, going, selector, display)
                    for key, _ in selector.select(timeout=1.0):
                        process = key.data
                        events, ended = process.read()
                        for event in events:
                            self._take(event, process, display)
                        if not ended:
                            continue
                        selector.unregister(process.events)
                        entry = self._end(process)
                        going.remove(process)
                        self._add(process.job.run, entry)
                        display.ended(process.worker, entry, pending)
            finally:
                for process in going:
                    process.stop()

    def _start(
        self,
        pending: list[Run],
        going: list[Process],
        selector: selectors.BaseSelector,
        display: Display,
    ) -> None:
        """Gives idle workers the next runs."""
        while pending and len(going) < len(self._cores):
            run = pending.pop(0)
            busy = {process.worker for process in going}
            worker = min(set(range(len(self._cores))) - busy)
            process = Process(self._job(run, self._cores[worker]), worker)
            going.append(process)
            selector.register(process.events, selectors.EVENT_READ, process)
            display.started(worker, run)

    def _take(
        self,
        event: dict[str, Any],
        process: Process,
        display: Display,
    ) -> None:
        if "machine" in event:
            self._results.check_machine(event["machine"])
        elif "not_written" in event:
            process.not_written = event["not_written"]
        else:
            display.stepped(process.worker, event)

    def _end(self, process: Process) -> dict[str, Any]:
        """The entry of a run whose process has come to an end."""
        code, job = process.wait(), process.job
        if code == NOT_WRITTEN:
            raise NotWritten(
                f"the run {job.run.name} could not be written: {process.not_written}"
            )
        record = pathlib.Path(job.result)
        if code == 0 and record.exists():
            return json.loads(record.read_text())
        reason = _last_line(job.log)
        if code < 0:
            killed = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                killed += ", perhaps for lack of memory"
            reason = f"{killed}; {reason}" if reason else killed
        reason = f"{reason or f'exit status {code}'} (log: {job.log})"
        return failure(job.run, reason, time.perf_counter() - process.started)

    def _add(self, run: Run, entry: dict[str, Any]) -> None:
        """Saves a finished run; what only served to make it goes."""
        try:
            self._results.add(entry)
        except OSError as error:
            raise NotWritten(
                f"{self._results.path} was not written: {error}. The run {run.name} is "
                f"kept in {self._result(run)}"
            ) from error
        self._result(run).unlink(missing_ok=True)
        shutil.rmtree(self._folder(run) / "checkpoints", ignore_errors=True)

    def _job(self, run: Run, cores: list[int] | None) -> Job:
        log = self._work / "logs" / f"{run.name.replace('/', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        return Job(
            run=run,
            criteria=[dict(criterion) for criterion in self._study.aborts(run)],
            folder=str(self._folder(run)),
            result=str(self._result(run)),
            log=str(log),
            cores=cores,
            cache=str(self._work / "compiled"),
        )

    def _folder(self, run: Run) -> pathlib.Path:
        return self._work / "runs" / run.model / run.condition / str(run.seed)

    def _result(self, run: Run) -> pathlib.Path:
        return self._work / "records" / f"{run.name.replace('/', '_')}.json"


def going_on(results: Results) -> str:
    """What is kept, and how to go on."""
    return (
        f"{len(results.runs)} finished runs ({count(results.runs)}) are kept in "
        f"{results.path}; the same command goes on from there."
    )


def _shares(workers: int) -> list[list[int] | None]:
    """The cores of each worker; None for all of them."""
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * workers
    cores = sorted(os.sched_getaffinity(0))
    workers = min(workers, len(cores))
    size = len(cores) // workers
    return [cores[i * size : (i + 1) * size] for i in range(workers)]


def _paths() -> list[str]:
    """Where a run's process imports from: the repository, then as ever."""
    earlier = os.environ.get("PYTHONPATH")
    return [str(ROOT), *([earlier] if earlier else [])]


def _last_line(log: str) -> str:
    """Of what a run has printed, without empty ones."""
    lines = pathlib.Path(log).read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
