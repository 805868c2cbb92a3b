"""A study's statistics, verdicts, costs and page, from JSON made here."""

import copy
import html
import html.parser
import itertools
import json
import math
import re

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.study import statistics
from benchmarks.study.costs import costs
from benchmarks.study.document import reference
from benchmarks.study.page import markdown, page, report, results
from benchmarks.study.plots import curve
from benchmarks.study.verdicts import MET, MISSED, NOT_TESTABLE, judge, verdicts

pytestmark = pytest.mark.full

CRITERIA = [
    {
        "name": "Memory falls by 20 %",
        "kind": "success",
        "metric": "peak_bytes.live",
        "compare": "relative",
        "at_most": -0.2,
    },
    {
        "name": "Perplexity rises by 1.0 at most",
        "kind": "success",
        "metric": "metrics.perplexity",
        "compare": "difference",
        "at_most": 1.0,
        "models": ["gpt"],
    },
    {
        "name": "Accuracy falls by 1 % at most",
        "kind": "success",
        "metric": "metrics.accuracy",
        "compare": "difference",
        "at_least": -0.01,
        "models": ["resnet"],
    },
    {
        "name": "Throughput falls by 10 % at most",
        "kind": "success",
        "metric": "units_per_second",
        "compare": "relative",
        "at_least": -0.1,
        "needs": "gpu",
        "why": "kernels are for GPUs; on a CPU quantisation is slower",
    },
    {
        "name": "No run diverges",
        "kind": "success",
        "metric": "diverged",
        "compare": "value",
        "at_most": 0,
    },
    {
        "name": "Validation loss rises by more than 5 %",
        "kind": "failure",
        "metric": "val_loss",
        "compare": "relative",
        "at_least": 0.05,
    },
    {
        "name": "Loss above 12 after warmup",
        "kind": "abort",
        "metric": "loss",
        "compare": "value",
        "at_most": 12,
        "after_step": 50,
    },
]
CONDITIONS = {
    "float32": {"title": "float32 (optax.adamw)", "config": {"optimizer": "adamw"}},
    "int8": {
        "title": "8-bit momentum",
        "config": {"optimizer": "adamw@flashoptim", "param_dtype": "bfloat16"},
        "by_model": {"resnet": {"optimizer": "sgd@flashoptim"}},
    },
    "int4": {"title": "4-bit momentum", "config": {"optimizer": "adamw4"}},
}
BYTES = {"float32": (4, 0, 8, 4), "int8": (2, 1, 2.1, 2), "int4": (2, 1, 1.1, 2)}


def study_document(seeds=(0, 1, 2), *, models=("gpt", "resnet"), criteria=None):
    """A finished study on a CPU: 8 bits are harmless, 4 bits cost quality."""
    trainers = {"gpt": "lm", "resnet": "vision"}
    study = {
        "name": "momentum",
        "title": "8- and 4-bit momentum",
        "question": "Does it cut memory?\n\nAnd does it keep quality?",
        "limits": "Two small models.",
        "reference": "float32",
        "presets": {"small": {"seeds": list(seeds), "workers": 2}},
        "models": {
            name: {"trainer": trainers[name], "title": f"{name}, small"}
            for name in models
        },
        "conditions": CONDITIONS,
        "criteria": CRITERIA if criteria is None else criteria,
    }
    return {
        "study": study,
        "preset": "small",
        "command": "python -m benchmarks.study run momentum.toml --preset small",
        "machine": {
            "device": "AMD EPYC",
            "platform": "cpu",
            "cores": 2,
            "jax": "0.10.2",
            "python": "3.11.7",
        },
        "date": "2026-11-22",
        "runs": [
            study_run(model, condition, seed)
            for seed in seeds
            for model in models
            for condition in CONDITIONS
        ],
    }


def study_run(model, condition, seed, points=60, count=1_000_000):
    rng = np.random.default_rng([seed, len(model)])
    own = np.random.default_rng([seed, len(model), len(condition), ord(condition[-1])])
    worse = {"float32": 0.0, "int8": 0.002, "int4": 0.12}[condition]
    steps = np.linspace(10, 600, points).astype(int)
    loss = 1.8 + 2.6 * np.exp(-steps / 90) + rng.normal(0, 0.03, points)
    loss += worse * np.minimum(1, steps / 200) + own.normal(0, 0.004, points)
    norm = 0.9 + np.exp(-steps / 50) + rng.normal(0, 0.02, points)
    norm *= 1 + worse + own.normal(0, 0.03, points)
    final = 1.95 + 0.02 * rng.normal() + worse + 0.004 * own.normal()
    parts = ("weights", "residual", "optimizer state", "gradients")
    bytes_of = {
        part: int(size * count)
        for part, size in zip(parts, BYTES[condition], strict=True)
    }
    seconds = {"float32": 60, "int8": 72, "int4": 75}[condition] + own.normal()
    if model == "gpt":
        metrics = {"perplexity": math.exp(final), "bits_per_byte": final / math.log(2)}
        units = "tokens"
    else:
        metrics = {"accuracy": 0.91 - worse / 4 + 0.003 * own.normal()}
        units = "images"
    return {
        "model": model,
        "condition": condition,
        "seed": seed,
        "status": "done",
        "reason": None,
        "config": {"steps": 600, "seed": seed},
        "summary": {
            "parameters": count,
            "bytes": bytes_of,
            "peak_bytes": {
                "live": sum(bytes_of.values()),
                "compiled": int(2.2 * sum(bytes_of.values())),
                "allocator": None,
            },
            "checkpoint_bytes": bytes_of["weights"] + bytes_of["optimizer state"],
            "seconds": seconds,
            "steps": 600,
            "units": units,
            "units_per_second": 600 * 4096 / seconds,
            "train_loss": float(loss[-3:].mean()),
            "val_loss": final,
            "metrics": metrics,
            "gradient_norm": float(norm.mean()),
            "nonfinite": 0,
            "diverged": False,
            "stopped": None,
        },
        "curve": {
            "step": steps.tolist(),
            "loss": loss.tolist(),
            "grad_norm": norm.tolist(),
        },
        "validation": {
            "step": [200, 400, 600],
            "loss": [final + 0.4, final + 0.1, final],
        },
        "wall_seconds": seconds + 20,
    }


# --- statistics

NUMBERS = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


def test_interval_and_p_are_scipys():
    differences = [0.3, -0.1, 0.4, 0.2, 0.25]
    test = scipy.stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(0.95)
    found = statistics.interval(differences)
    assert found.low == pytest.approx(low) and found.high == pytest.approx(high)
    assert statistics.p_value(differences) == pytest.approx(test.pvalue)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(2.0, 3.0, size=(4000, 3))
    found = [statistics.interval(sample) for sample in samples]
    covered = np.mean([x.low <= 2.0 <= x.high for x in found])
    # Three standard errors of a share of 0.95 among 4,000.
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)


def test_effect_size_is_not_biased():
    """Hedges' correction: of few pairs, the mean effect is that of many."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0.8, 1.0, size=(40_000, 5))
    found = np.mean([statistics.effect_size(sample) for sample in samples])
    assert found == pytest.approx(0.8, abs=0.02)
    assert math.isnan(statistics.effect_size([0.1, 0.2]))
    assert math.isnan(statistics.effect_size([0.1, 0.1, 0.1]))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_rejects_what_the_closed_test_rejects(p_values):
    """A p-value holds for all comparisons: that of the worst set that it is in."""
    places = range(len(p_values))
    expected = [
        max(
            min(1, len(group) * min(p_values[j] for j in group))
            for size in range(1, len(p_values) + 1)
            for group in itertools.combinations(places, size)
            if i in group
        )
        for i in places
    ]
    found = statistics.holm([*p_values, math.nan])
    assert found[:-1] == pytest.approx(expected) and math.isnan(found[-1])


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=3, max_size=6), NUMBERS)
def test_the_seeds_that_would_decide_do(values, bound):
    found = statistics.interval(values)
    count = statistics.seeds_to_decide(found, bound)
    if count is None or count == 2 or found.spread == 0:
        return

    def half(n):
        quantile = scipy.stats.t.ppf(0.975, n - 1)
        return quantile * found.spread / math.sqrt(n)

    assert half(count) < abs(found.mean - bound) <= half(count - 1)


# --- verdicts


def criterion_of(metric="val_loss", compare="relative", kind="success", **bound):
    return {
        "name": "asked",
        "kind": kind,
        "metric": metric,
        "compare": compare,
        **(bound or {"at_most": 0.01}),
    }


def document_of(differences, criterion, **changes):
    """A study of one model: int8's losses are float32's and these differences."""
    document = study_document(range(len(differences)), models=("gpt",))
    document["study"]["criteria"] = [criterion]
    for run in document["runs"]:
        loss = 2.0 + 0.1 * run["seed"]
        if run["condition"] == "int8":
            loss += differences[run["seed"]]
            run["summary"] |= changes
        run["summary"]["val_loss"] = loss
    return document


def judged(document):
    (criterion,) = document["study"]["criteria"]
    return judge(document, criterion, "gpt", "int8")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(NUMBERS, min_size=2, max_size=6),
    NUMBERS,
    st.sampled_from(["at_most", "at_least"]),
    st.sampled_from(["success", "failure"]),
)
def test_a_verdict_follows_the_interval(differences, bound, side, kind):
    criterion = criterion_of(compare="difference", kind=kind, **{side: bound})
    document = document_of(differences, criterion)
    cell = judged(document)
    runs = {
        (r["condition"], r["seed"]): r["summary"]["val_loss"] for r in document["runs"]
    }
    pairs = [runs["int8", s] - runs["float32", s] for s in range(len(differences))]
    found = statistics.interval(pairs)
    margin = 1e-6 * (1 + abs(bound))
    if min(abs(found.low - bound), abs(found.high - bound)) < margin:
        return  # arithmetic decides
    within = {
        "at_most": [x <= bound for x in (found.low, found.high)],
        "at_least": [x >= bound for x in (found.low, found.high)],
    }[side]
    expected = MET if all(within) else NOT_TESTABLE if any(within) else MISSED
    assert cell["verdict"] == expected
    assert ("seeds would decide" in cell["why"]) == (expected == NOT_TESTABLE)


def test_bytes_need_no_seeds():
    criterion = criterion_of("peak_bytes.live", at_most=-0.2)
    assert judged(document_of([0.0], criterion))["verdict"] == MET
    criterion = criterion_of("peak_bytes.live", at_most=-0.7)
    cell = judged(document_of([0.0], criterion))
    assert cell["verdict"] == MISSED and cell["low"] == cell["high"]


def test_what_cannot_be_tested_says_why():
    one = judged(document_of([0.0], criterion_of()))
    assert one["verdict"] == NOT_TESTABLE and "one seed" in one["why"]
    needs = criterion_of("units_per_second") | {"needs": "gpu", "why": "no kernels"}
    cell = judged(document_of([0.0, 0.1], needs))
    assert (cell["verdict"], cell["why"]) == (NOT_TESTABLE, "no kernels")
    document = document_of([0.0, 0.1], needs)
    document["machine"]["platform"] = "gpu"
    assert (
        judged(document)["verdict"] != NOT_TESTABLE
        or "interval" in (judged(document)["why"])
    )
    allocator = criterion_of("peak_bytes.allocator")
    assert "no run knows" in judged(document_of([0.0, 0.1], allocator))["why"]
    document = document_of([0.0, 0.1], criterion_of())
    document["runs"] = [r for r in document["runs"] if r["condition"] == "float32"]
    assert "no run was made yet" in judged(document)["why"]
    document = document_of([0.0, 0.1], criterion_of())
    document["runs"] = [r for r in document["runs"] if r["condition"] == "int8"]
    assert "no run of its reference" in judged(document)["why"]


def broken(document, status, **summary):
    """The last run of int8 ended so."""
    document = copy.deepcopy(document)
    run = [run for run in document["runs"] if run["condition"] == "int8"][-1]
    run["status"], run["reason"] = status, "NaN at step 31"
    run["summary"] = None if status == "failed" else run["summary"] | summary
    return document


def test_a_run_that_breaks_down_misses_what_is_asked_of_its_quality():
    document = document_of([0.0, 0.0, 0.0], criterion_of(at_most=0.01))
    assert judged(document)["verdict"] == MET
    cell = judged(broken(document, "diverged", diverged=True))
    assert cell["verdict"] == MISSED
    assert cell["why"] == "seed 2 diverged (NaN at step 31)"
    # A failure criterion is worded the other way: it is met.
    document = document_of([0.0, 0.0, 0.0], criterion_of(kind="failure", at_least=0.05))
    assert judged(document)["verdict"] == MISSED
    assert judged(broken(document, "diverged", diverged=True))["verdict"] == MET
    # A crash says nothing of quality; the others decide.
    cell = judged(broken(document, "failed"))
    assert cell["seeds"] == 2 and "1 seed is missing" in cell["why"]


def test_accidents_count_one_by_one():
    criterion = criterion_of("diverged", "value", at_most=0)
    document = document_of([0.0, 0.0, 0.0], criterion)
    assert judged(document)["verdict"] == MET
    cell = judged(broken(document, "diverged", diverged=True))
    assert cell["verdict"] == MISSED and "seed 2" in cell["why"]
    cell = judged(broken(document, "failed"))
    assert cell["verdict"] == NOT_TESTABLE  # that run might have diverged
    abort = {"name": "asked", "kind": "abort", "metric": "loss", "at_most": 12}
    document["study"]["criteria"] = [abort]
    assert judged(document)["verdict"] == MET
    assert judged(broken(document, "aborted"))["verdict"] == MISSED


def test_a_reference_that_broke_down_is_not_held_against_others():
    document = document_of([0.0, 0.0, 0.0], criterion_of(at_most=0.01))
    for run in document["runs"]:
        if run["seed"] == 1:
            run["status"] = "diverged"
    cell = judged(document)
    assert (cell["verdict"], cell["seeds"]) == (MET, 2)
    assert "1 seed is missing" in cell["why"]
    for run in document["runs"]:
        run["status"] = "diverged"
    cell = judged(document)
    assert cell["verdict"] == NOT_TESTABLE
    assert cell["why"] == "every run of float32 broke down"


def test_a_number_on_its_bound_is_within():
    document = document_of([0.0], criterion_of("peak_bytes.live", at_most=-0.2))
    for run in document["runs"]:
        live = 800 if run["condition"] == "int8" else 1000
        run["summary"]["peak_bytes"]["live"] = live
    assert 800 / 1000 - 1 > -0.2  # in floats
    assert judged(document)["verdict"] == MET


def test_conditions_may_have_references_of_their_own():
    document = study_document()
    more = {"lion": {}, "lion8": {"reference": "lion"}}
    document["study"]["conditions"] = {**CONDITIONS, **more}
    names = ("float32", "int8", "lion", "lion8")
    found = [reference(document, name) for name in names]
    assert found == [None, "float32", None, "lion"]


# --- costs


def test_a_gpu_has_a_price_and_a_cpu_none():
    document = study_document(models=("gpt",))
    found = costs(document)
    assert found["dollars_per_hour"] is None and "no GPU" in found["why"]
    walls = [run["wall_seconds"] for run in document["runs"]]
    assert found["study"] == {"seconds": pytest.approx(sum(walls)), "dollars": None}
    document["machine"] |= {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3"}
    prices = {"dollars_per_hour": {"H100": 3.6, "100": 1.0}, "note": "mine"}
    found = costs(document, prices)
    assert found["dollars_per_hour"] == 3.6 and found["assumption"] == "mine"
    assert found["study"]["dollars"] == pytest.approx(sum(walls) / 1000)
    runs = {
        (r["condition"], r["seed"]): r["summary"]["seconds"] for r in document["runs"]
    }
    saved = [1 - runs["int8", seed] / runs["float32", seed] for seed in (0, 1, 2)]
    row = next(x for x in found["conditions"] if x["condition"] == "int8")
    assert row["saved"]["mean"] == pytest.approx(np.mean(saved))
    document["machine"]["device"] = "A potato"
    assert "no price for A potato" in costs(document, prices)["why"]


def test_curves_of_seeds_that_stopped_early():
    runs = [
        {"curve": {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]}},
        {"curve": {"step": [1, 2], "loss": [5.0, math.nan]}},
        {"curve": None},
        {},
    ]
    found = curve(runs, "curve", "loss")
    assert found.mean.tolist() == [4.0, 2.0, 1.0]
    assert found.high.tolist() == [5.0, 2.0, 1.0]
    assert curve(runs, "curve", "grad_norm") is None


# --- the page

VOID = {"meta", "img", "br", "link", "path", "use", "rect", "hr"}


class Reader(html.parser.HTMLParser):
    """Notes tags that do not match, and what is fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.problems, self.alts, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        attributes = dict(attrs)
        if tag == "img":
            self.alts.append(attributes.get("alt"))
        if tag in ("script", "link", "iframe"):
            self.problems.append(tag)
        for name in ("src", "href", "srcset"):
            target = attributes.get(name) or ""
            if target and not target.startswith(("data:", "#", "study.json")):
                self.problems.append(target)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data):
        self.words.append(data)


def read(content: str) -> Reader:
    reader = Reader()
    reader.feed(content)
    reader.close()
    assert not reader.problems and not reader.open
    assert "url(" not in content and "@import" not in content
    return reader


def test_a_page_holds_everything_and_fetches_nothing(tmp_path):
    document = study_document()
    title = "8 & 4 bits <script>alert(1)</script>"
    document["study"]["title"] = title
    (tmp_path / "study.json").write_text(json.dumps(document))
    report(tmp_path, tmp_path / "summary.md")
    content = (tmp_path / "index.html").read_text()
    reader = read(content)
    words = re.sub(r"\s+", " ", " ".join(reader.words))
    assert title in words and "<script>" not in content
    found = json.loads((tmp_path / "study.json").read_text())
    shown = [found["results"]["answer"]]
    for criterion in found["results"]["criteria"]:
        shown += [criterion["name"], criterion["why"]]
    for text in shown:
        assert re.sub(r"\s+", " ", text) in words
    for shown in ("Does it cut memory?", "And does it keep quality?", "Two small"):
        assert shown in words
    assert document["command"] in words and "nan" not in words.split()
    # Plots say in words what they show.
    assert len(reader.alts) >= 8 and all(len(alt or "") > 20 for alt in reader.alts)
    assert not list(tmp_path.glob(".*"))  # no drafts
    summary = (tmp_path / "summary.md").read_text()
    assert summary == markdown(found)
    kept = json.loads((tmp_path / "summary.json").read_text())["runs"]
    losses = [
        sorted(run["summary"]["val_loss"] for run in runs)
        for runs in (kept, document["runs"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, *of_models = summary.split("\n## ")
    assert first.count("\n| ") == len(CRITERIA) + 1 and document["command"] in first
    assert len(of_models) == len(document["study"]["models"])
    for condition in document["study"]["conditions"]:
        assert all(f"| `{condition}` |" in part for part in of_models)


def test_criteria_that_were_changed_after_runs_are_shown():
    document = study_document(models=("gpt",))
    before = {**CRITERIA[0], "at_most": -0.6}
    change = {"date": "2026-11-20", "runs": 9, "criterion": CRITERIA[0]["name"]}
    document["changes"] = [
        change | {"before": before, "after": CRITERIA[0]},
        change | {"criterion": "Another", "before": None, "after": CRITERIA[1]},
    ]
    document["results"] = results(document)
    words = " ".join(read(page(document)).words)
    assert "2026-11-20, after 9 runs" in words and "was not there" in words
    assert "at most \N{MINUS SIGN}60" in words


def test_verdicts_of_the_whole_study():
    document = study_document()
    found = {criterion["name"]: criterion for criterion in verdicts(document)}
    assert found["Memory falls by 20 %"]["verdict"] == MET
    assert found["Throughput falls by 10 % at most"]["verdict"] == NOT_TESTABLE
    assert found["No run diverges"]["verdict"] == MET
    # 4 bits lose 0.12 nats of 1.95: more than 5 %; one condition is enough.
    assert found["Validation loss rises by more than 5 %"]["verdict"] == MET
    cells = found["Accuracy falls by 1 % at most"]["cells"]
    assert {cell["model"] for cell in cells} == {"resnet"}
    assert {cell["condition"] for cell in cells} == {"int8", "int4"}


UNUSUAL = {
    "nothing was run": lambda d: d | {"runs": []},
    "one run": lambda d: d | {"runs": d["runs"][:1]},
    "half of it": lambda d: d | {"runs": d["runs"][: len(d["runs"]) // 2]},
    "one seed": lambda d: study_document([0]),
    "a crash": lambda d: broken(d, "failed"),
    "a divergence": lambda d: broken(
        d, "diverged", diverged=True, val_loss=math.nan, metrics={}, nonfinite=10
    ),
    "released gradients": lambda d: broken(d, "done", gradient_norm=None),
    "no metrics": lambda d: broken(d, "done", metrics={}, peak_bytes={}, bytes={}),
    "no machine": lambda d: {
        k: v for k, v in d.items() if k not in ("machine", "date")
    },
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_page_of_what_is_missing_or_broken(name):
    document = UNUSUAL[name](study_document(models=("gpt",)))
    document = json.loads(json.dumps(document))  # as it would be read
    document["results"] = results(document)
    reader = read(page(document))
    words = " ".join(reader.words)
    finished, planned = (document["results"][k] for k in ("finished", "planned"))
    if finished < planned:
        assert f"{finished} of {planned} runs" in words and "Unfinished" in words
    if name == "a crash":
        assert "NaN at step 31" in words and "failed" in words
    # What is written is JSON that browsers read, too.
    json.loads(json.dumps(document["results"], allow_nan=False))
