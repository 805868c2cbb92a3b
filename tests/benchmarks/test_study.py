"""The study runner on a trainer without training: what it refuses and what it keeps."""

import contextlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from rich.console import Console

from benchmarks.study import __main__ as command
from benchmarks.study.definition import DefinitionError, Run, read
from benchmarks.study.display import duration
from benchmarks.study.records import POINTS, curve, record, stop_reason
from benchmarks.study.worker import Job, execute
from tests.disks import full_disk

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = ROOT / "benchmarks/study/studies"

TOML = """
name = "tiny"
title = "A tiny study"
question = "Does it run?"
reference = "float32"

[presets.small]
seeds = [0, 1]
workers = 2

[models.a]
trainer = "tests.benchmarks.fake_trainer"
config = { warmup = 1, save_every = 2, diary = "DIARY" }
small = { steps = 6 }

[models.b]
trainer = "tests.benchmarks.fake_trainer"
config = { warmup = 1, save_every = 2, diary = "DIARY" }
small = { steps = 4 }

[conditions.float32]
title = "float32"
config = { optimizer = "adamw", param_dtype = "float32" }

[conditions.codes]
models = ["a"]
config = { optimizer = "adamw8" }

[[criteria]]
name = "Less memory"
kind = "success"
metric = "peak_bytes.live"
compare = "relative"
at_most = -0.2

[[criteria]]
name = "Loss explodes"
kind = "abort"
metric = "loss"
at_most = 50
after_step = 3
"""


@pytest.fixture
def file(tmp_path):
    """Writes the study above, with replacements, and returns its file."""

    def write(*replacements):
        text = TOML.replace("DIARY", str(tmp_path / "diary"))
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "tiny.toml"
        path.write_text(text)
        return path

    return write


PAGE = command._report


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Pages are test_study_report.py's matter, and test_full_disk's."""
    monkeypatch.setattr(command, "_report", lambda folder, console: 0)


def run(path, out, *args):
    """What the command returns, and study.json."""
    code = command.main(["run", str(path), "--out", str(out), *args])
    return code, json.loads((out / "study.json").read_text())


# --- the definition


def test_matrix(file):
    study = read(file(), "small")
    assert [run.name for run in study.runs] == [
        "a/float32/0",
        "a/codes/0",
        "b/float32/0",
        "a/codes/1",  # each seed begins with another condition
        "a/float32/1",
        "b/float32/1",
    ]
    configs = {run.name: run.config for run in study.runs}
    assert configs["a/codes/1"]["optimizer"] == "adamw8"
    assert configs["a/codes/1"]["steps"] == 6
    assert configs["b/float32/0"]["steps"] == 4
    assert configs["b/float32/1"]["seed"] == 1
    assert configs["b/float32/1"]["learning_rate"] is None  # defaults are there


def test_later_tables_win(file):
    path = file(
        ('"adamw8" }', '"adamw8", steps = 7 }\nby_model = { a = { steps = 8 } }')
    )
    steps = {run.name: run.config["steps"] for run in read(path, "small").runs}
    assert steps["a/codes/0"] == 8
    assert steps["a/float32/0"] == 6


def test_models_of_other_presets_are_not_there(file):
    path = file(
        ("workers = 2", "workers = 2\n\n[presets.gpu]\nseeds = [0]"),
        ("small = { steps = 4 }", 'presets = ["gpu"]'),
        ("at_most = -0.2", 'at_most = -0.2\nmodels = ["b"]'),
    )
    small, gpu = read(path, "small"), read(path, "gpu")
    assert {run.model for run in small.runs} == set(small.content["models"]) == {"a"}
    assert [run.name for run in gpu.runs if run.model == "b"] == ["b/float32/0"]
    assert len(small.content["criteria"]) == 1 and len(gpu.content["criteria"]) == 2


MISTAKES = {
    "not_toml": ('title = "A', 'title = A"', "tiny.toml is not TOML: .*line 3"),
    "key": ("question", "qestion", "'qestion' is not known; did you mean question"),
    "no_question": ('question = "Does it run?"', "", "question is missing"),
    "other_name": ('"tiny"', '"small"', "name is 'small', the file's is 'tiny'"),
    "seeds": ("[0, 1]", "[0, 0]", r"seeds is \[0, 0\]; give whole numbers, each once"),
    "workers": ("workers = 2", "workers = 0", "workers is 0; give 1 or more"),
    "trainer": (
        'trainer = "tests.benchmarks.fake_trainer"',
        'trainer = "visoin"',
        "models.a: trainer: 'visoin' is no trainer; did you mean vision",
    ),
    "module": (
        "tests.benchmarks.fake_trainer",
        "tests.benchmarks.no_trainer",
        "models.a: trainer 'tests.benchmarks.no_trainer' cannot be imported",
    ),
    "reference": (
        'reference = "float32"',
        'reference = "float23"',
        "reference: 'float23' is no condition; did you mean float32",
    ),
    "model": (
        'models = ["a"]',
        'models = ["c"]',
        "conditions.codes: models: 'c' is no model; there are a, b",
    ),
    "kind": ('"success"', '"sucess"', "kind: 'sucess' is no kind; did you mean succ"),
    "metric": (
        "peak_bytes.live",
        "peak_bites.live",
        "'Less memory': metric: 'peak_bites.live' .* did you mean peak_bytes.live",
    ),
    "row_metric": ('metric = "loss"', 'metric = "los"', "no key of a row; .* loss"),
    "bounds": ("at_most = -0.2", "", "'Less memory': give a number as one of"),
    "compare": ('"relative"', '"relativ"', "no comparison; did you mean relative"),
    "option": (
        "warmup = 1,",
        "warmpu = 1,",
        "models.a with conditions.float32: 'warmpu' is no option; .* 'warmup'",
    ),
    "value": ("steps = 6", 'steps = "6"', "steps is '6', a str"),
    "optimizer": ('"adamw8"', '"adamw7"', "no optimizer 'adamw7'; did you mean adamw"),
    "runners": ("steps = 6", "seed = 6", "seed are the runner's to set"),
    "lacking": (
        'title = "float32"',
        'models = ["b"]',
        "conditions.codes: its reference 'float32' does not run on a",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_before_the_first_run(mistake, file, tmp_path, capsys):
    old, new, message = MISTAKES[mistake]
    code = command.main(["run", str(file((old, new))), "--out", str(tmp_path / "out")])
    assert code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_all_mistakes_at_once(file):
    path = file(("workers", "wrokers"), ("adamw8", "adamw9"), ("codes]", "co des]"))
    with pytest.raises(DefinitionError, match="not TOML"):
        read(path, "small")
    path = file(("workers", "wrokers"), ("at_most = -0.2", ""), ("[0, 1]", "0"))
    with pytest.raises(DefinitionError, match="(?s)wrokers.*seeds is 0.*give a number"):
        read(path, "small")
    with pytest.raises(
        DefinitionError, match="'smal' is no preset; did you mean small"
    ):
        read(file(), "smal")
    with pytest.raises(DefinitionError, match="no file .*there are .*tiny.toml"):
        read(path.with_name("tinny.toml"), "small")


@pytest.mark.parametrize("pattern", ["z/*", "a"])
def test_only_has_to_fit(pattern, file, capsys):
    assert command.main(["run", str(file()), "--list", "--only", pattern]) == 2
    assert "a/codes/1" in capsys.readouterr().err


def test_list(file, capsys):
    assert command.main(["run", str(file()), "--list", "--only", "a/codes/*"]) == 0
    out = capsys.readouterr().out
    assert "2 runs" in out and "0 1" in out and "adamw8" in out
    assert "float32 " not in out


# --- one run


def job(tmp_path, mood, criteria=(), steps=20, **options):
    run = Run(
        "a",
        "codes",
        0,
        "tests.benchmarks.fake_trainer",
        {"optimizer": "adamw8", "steps": steps, "warmup": 1, "mood": mood, "seed": 0}
        | options,
    )
    return Job(
        run,
        list(criteria),
        folder=str(tmp_path / "run"),
        result=str(tmp_path / "record.json"),
        log="the.log",
        cores=None,
        cache="",
    )


def entry_of(job):
    events = []
    execute(job, events.append)
    return json.loads(pathlib.Path(job.result).read_text()), events


def test_a_run(tmp_path):
    entry, events = entry_of(job(tmp_path, "well"))
    assert entry["status"] == "done" and entry["reason"] is None
    assert entry["summary"]["step_seconds"] == 0.1
    assert entry["summary"]["bytes_per_parameter"] == 12
    assert entry["curve"]["step"] == list(range(1, 21))
    assert entry["validation"] == {"step": [20], "loss": [5 * 0.9**20]}
    assert events[0]["machine"]["platform"] == "cpu"
    assert events[1] == {"step": 1, "steps": 20, "loss": 4.5}


def test_diverged(tmp_path):
    entry, _ = entry_of(job(tmp_path, "nan"))
    assert entry["status"] == "diverged"
    assert "not finite at step 10" in entry["reason"]
    assert entry["curve"]["step"][-1] == 10  # it was not run any further
    assert entry["curve"]["loss"][-1] is None  # the record is strict JSON
    entry, _ = entry_of(job(tmp_path, "rising", seed=1))
    assert entry["status"] == "diverged"
    assert entry["reason"] == "the last losses are 120, the first 5.5"


def test_aborted(tmp_path):
    criterion = tomllib.loads(TOML)["criteria"][1]
    entry, _ = entry_of(job(tmp_path, "rising", [criterion]))
    assert entry["status"] == "aborted"
    assert entry["reason"] == "Loss explodes: loss is 110 at step 10, above 50"
    entry, _ = entry_of(job(tmp_path, "rising", [criterion | {"after_step": 15}]))
    assert entry["reason"] == "Loss explodes: loss is 116 at step 16, above 50"
    assert stop_reason([criterion], {"step": 9, "loss": 50}) is None
    small = {"name": "x", "metric": "grad_norm", "at_least": 0.1}
    assert "below 0.1" in stop_reason([small], {"step": 1, "grad_norm": 0.0})
    assert stop_reason([small], {"step": 1, "loss": 1.0}) is None  # it is not known


def test_failed(tmp_path, capsys):
    entry, _ = entry_of(job(tmp_path, "wrong"))
    assert entry["status"] == "failed" and entry["summary"] is None
    assert entry["reason"] == "RuntimeError: the weights have left (log: the.log)"
    assert "Traceback" in capsys.readouterr().err


def test_no_record_of_a_run_on_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        entry_of(job(tmp_path, "full"))
    assert not (tmp_path / "record.json").exists()


def test_resumes_the_very_run_alone(tmp_path):
    diary = tmp_path / "diary"
    options = dict(steps=8, save_every=2, diary=str(diary))
    for mood in ("full", "full", "well"):
        with contextlib.suppress(OSError):
            entry_of(job(tmp_path, mood, **options))
    lines = [line.split()[-1] for line in diary.read_text().splitlines()]
    assert lines == ["0", "2", "0"]  # the last is another run: it started again


def test_curves_are_short():
    for length in (1, 200, 201, 1001):
        history = [{"step": i, "loss": 2.0 * i} for i in range(length)]
        found = curve(history)
        assert len(found["step"]) <= POINTS
        assert found["loss"] == [2 * step for step in found["step"]]
        assert set(found["grad_norm"]) == {None}
        assert math.isclose(found["step"][-1], length - 1, rel_tol=0.01, abs_tol=1)


def test_a_run_that_had_ended_before_it_resumed():
    run = Run("a", "b", 0, "", {})
    summary = {"steps": 0, "seconds": 0.0, "stopped": None, "diverged": False}
    summary |= {"peak_bytes": {"live": 12}, "parameters": 1}
    assert record(run, [], summary, 1.0)["summary"]["step_seconds"] is None


@pytest.mark.parametrize(
    "seconds, text", [(42.4, "42 s"), (200, "3 min"), (9000, "2 h 30 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# --- whole studies


def test_a_study_goes_on_whatever_happens_to_its_runs(file, tmp_path, capsys):
    moods = [
        ('"adamw8" }', '"adamw8", mood = "wrong" }\nby_model = { a = {} }'),
        ("small = { steps = 4 }", 'small = { steps = 4, mood = "killed" }'),
    ]
    code, content = run(file(*moods), tmp_path / "out")
    assert code == 1  # some failed
    found = {
        (x["model"], x["condition"], x["seed"]): (x["status"], x["reason"])
        for x in content["runs"]
    }
    assert list(found) == [  # in the study's order
        (x.model, x.condition, x.seed) for x in read(file(*moods), "small").runs
    ]
    assert found["a", "float32", 0] == ("done", None)
    assert found["a", "codes", 1][0] == "failed"
    assert "RuntimeError: the weights have left" in found["a", "codes", 1][1]
    status, reason = found["b", "float32", 0]
    assert status == "failed"
    assert reason.startswith(
        "killed by SIGKILL, perhaps for lack of memory; all was we"
    )
    log = re.search(r"\(log: (.*)\)", reason)[1]
    assert "all was well" in pathlib.Path(log).read_text()
    assert content["machine"]["platform"] == "cpu"
    assert content["study"] == tomllib.loads(file(*moods).read_text())
    assert content["preset"] == "small"
    assert "[6/6]" in capsys.readouterr().out

    # Finished runs are not repeated, failed ones on demand.
    before = (tmp_path / "diary").read_text()
    code, again = run(file(*moods), tmp_path / "out")
    assert code == 1 and again["runs"] == content["runs"]
    assert (tmp_path / "diary").read_text() == before
    code, _ = run(file(*moods), tmp_path / "out", "--retry", "--only", "b/*/0")
    after = (tmp_path / "diary").read_text()
    assert after.removeprefix(before).startswith("adamw 0 ")

    # What the definition has changed is named.
    capsys.readouterr()
    changed = file(*moods, ("steps = 6", "steps = 7"))
    assert command.main(["run", str(changed), "--out", str(tmp_path / "out")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds the run a/float32/0 with steps 6, not 7. Delete" in error
    fewer = file(*moods, ("[0, 1]", "[0]"))
    assert command.main(["run", str(fewer), "--out", str(tmp_path / "out")]) == 2
    assert "which the study does not have" in capsys.readouterr().err

    # A criterion that changes after the runs leaves a trace.
    softer = file(*moods, ("at_most = -0.2", "at_most = -0.1"))
    _, content = run(softer, tmp_path / "out", "--only", "a/float32/0")
    (change,) = content["changes"]
    assert change["criterion"] == "Less memory"
    assert (change["before"]["at_most"], change["after"]["at_most"]) == (-0.2, -0.1)


def start(path, out, *args):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.study", "run", path, "--out", out, *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def pids(out):
    """Of the processes that run or ran trainings into a folder."""
    found = []
    for environment in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"benchmarks.study.worker" in environment.read_bytes():
                if str(out) in os.readlink(environment.parent / "fd/2"):
                    found.append(int(environment.parent.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_nothing_is_lost_and_nothing_repeated(how, file, tmp_path):
    out, diary = tmp_path / "out", tmp_path / "diary"
    slow = ("warmup = 1,", "warmup = 1, pause = 0.3,")
    # One model goes ahead, the other is in the middle when it happens.
    path = file(slow, ("small = { steps = 6 }", "small = { steps = 14 }"))
    process = start(path, out, "--only", "*/float32/0")
    try:
        wait_for(lambda: (out / "study.json").exists())
        kept = json.loads((out / "study.json").read_text())["runs"]
        process.send_signal(how)
        printed, _ = process.communicate(timeout=30)
        wait_for(lambda: not pids(out))  # its children end with it
    finally:
        process.kill()
        process.wait()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted. 1 finished runs (1 done) are kept in" in printed
        assert "the same command goes on from there" in printed
    assert [(x["model"], x["status"]) for x in kept] == [("b", "done")]

    # The rest without pauses, which are no reason to refuse what went before.
    code, content = 0, json.loads((out / "study.json").read_text())
    assert content["runs"] == kept
    checkpoints = (out / "work/runs/a/float32/0/checkpoints").iterdir()
    saved = max(int(path.name) for path in checkpoints)
    begun = diary.read_text().splitlines()
    assert sorted(begun[:2]) == ["adamw 0 0", "adamw 0 0"]
    code, content = run(path, out, "--only", "*/float32/0")
    assert code == 0
    assert content["runs"][1:] == kept
    resumed = diary.read_text().splitlines()[len(begun) :]
    assert resumed == [f"adamw 0 {saved}"] and saved > 0


def test_full_disk(file, tmp_path, capsys, monkeypatch):
    out, path = tmp_path / "out", file()
    _, before = run(path, out, "--only", "a/float32/0")
    size = (out / "study.json").stat().st_size
    args = ["run", str(path), "--out", str(out), "--only", "a/*/0"]
    with full_disk(size):  # enough for a run's record, not for all of them
        assert command.main(args) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "study.json was not written: [Errno 27] File too large" in printed
    assert re.search("The run a/codes/0 is kept in .*a_codes_0.json", printed)
    assert json.loads((out / "study.json").read_text()) == before
    lines = (tmp_path / "diary").read_text()
    code, content = run(path, out, "--only", "a/*/0")
    assert code == 0 and len(content["runs"]) == 2
    assert (tmp_path / "diary").read_text() == lines  # neither run was repeated

    full = file(("small = { steps = 4 }", 'small = { steps = 4, mood = "full" }'))
    code, content = run(full, out, "--only", "b/float32/0")
    assert code == 1 and len(content["runs"]) == 2  # it is not a failed run
    printed = " ".join(capsys.readouterr().out.split())
    assert "b/float32/0 could not be written: [Errno 28]" in printed
    assert "2 finished runs (2 done) are kept in" in printed

    monkeypatch.setattr(command, "_report", PAGE)
    with full_disk(100):
        assert command.main(["report", str(out)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "index.html was not made: [Errno 27] File too large" in printed
    assert json.loads((out / "study.json").read_text()) == content
    assert command.main(["report", str(out)]) == 0
    assert "A tiny study" in (out / "index.html").read_text()
    assert json.loads((out / "study.json").read_text())["results"]["criteria"]


def test_a_preset_for_gpus(file, tmp_path, capsys):
    path = file(("workers = 2", 'workers = 2\nneeds = "gpu"'))
    out = tmp_path / "out"
    args = ["run", str(path), "--out", str(out), "--only", "b/float32/0"]
    assert command.main(args) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the preset 'small' needs a gpu; JAX has found cpu alone" in error
    assert not pids(out) and not (out / "study.json").exists()


def test_another_machine(file, tmp_path, capsys):
    path, out = file(), tmp_path / "out"
    code, content = run(path, out, "--only", "b/float32/0")
    content["machine"]["device"] = "Cray-1"
    (out / "study.json").write_text(json.dumps(content))
    args = ["run", str(path), "--out", str(out), "--only", "b/float32/1"]
    assert command.main(args) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "were made with device 'Cray-1'; here it is" in error
    assert json.loads((out / "study.json").read_text()) == content


def test_one_process_at_a_time(file, tmp_path, capsys):
    import fcntl

    work = tmp_path / "out/work"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        args = ["run", str(file()), "--out", str(tmp_path / "out")]
        assert command.main(args) == 2
    assert "another process runs this study" in capsys.readouterr().err


def test_damaged_results(file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/study.json").write_text('{"runs": [')
    assert command.main(["run", str(file()), "--out", str(tmp_path / "out")]) == 2
    assert "study.json is damaged" in capsys.readouterr().err


# --- the five studies


@pytest.mark.parametrize("preset", ["small", "gpu"])
@pytest.mark.parametrize("name", [path.stem for path in STUDIES.glob("*.toml")])
def test_the_studies_are_well_formed(name, preset):
    study = read(STUDIES / f"{name}.toml", preset)
    kinds = {criterion["kind"] for criterion in study.content["criteria"]}
    assert kinds == {"success", "failure", "abort"}
    assert study.runs


def test_the_study_of_the_docs_is_one(tmp_path):
    page = (ROOT / "docs/studies.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "mine.toml"
    file.write_text(block)
    assert len(read(file, "small").runs) == 6


def test_display_on_a_terminal(file):
    from benchmarks.study.display import Display

    study = read(file(), "small")
    console = Console(force_terminal=True, width=100, record=True)
    with Display(console, "Title", 6, 0, 2) as display:
        display.started(0, study.runs[0])
        display.stepped(0, {"step": 3, "steps": 6, "loss": 1.5})
        display._bars.refresh()
        entry = {"model": "a", "condition": "float32", "seed": 0, "status": "done"}
        entry |= {"wall_seconds": 120.0, "summary": None, "reason": None}
        display.ended(0, entry, list(study.runs[1:]))
    text = console.export_text()
    assert "a/float32/0" in text and "loss 1.5" in text
    assert "[1/6] a/float32/0: done in 2 min; about 5 min left" in text
