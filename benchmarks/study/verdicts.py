"""Criteria, written before the runs, against what came out.

By intervals: with d the paired differences over seeds and b the bound, a criterion is
met where all of the interval of d's mean lies within b, missed where all of it lies
outside, and "not testable here" where b is inside. Of metrics that arithmetic decides
(bytes) and of counts of accidents (NaN, divergence), every run counts instead.

A success criterion says what must hold, and a failure criterion is met when the bad
thing happened. An abort criterion is met where it stopped no run.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import document as doc
from .document import Document, Run
from .statistics import CONFIDENCE, interval, seeds_to_decide
from .wording import amount, change, listed, span

MET, MISSED, NOT_TESTABLE = "met", "missed", "not testable here"
SLACK = 1e-9
"""What float arithmetic may do to a number that lies right on its bound."""

Criterion = Mapping[str, Any]
Cell = dict[str, Any]


def verdicts(document: Document) -> list[dict[str, Any]]:
    """A verdict of every criterion, with one for each model and condition.

    Args:
      document: a study's JSON, finished or not.

    Returns:
      for each criterion its "name", "kind", "verdict" and "why", and "cells": for each
      model and condition "verdict", "why", "mean", "low", "high", "seeds" (how many
      were compared) and "seeds_to_decide", None where unknown.
    """
    return [_judged(document, criterion) for criterion in _criteria(document)]


def judge(document: Document, criterion: Criterion, model: str, condition: str) -> Cell:
    """The verdict of one criterion on a model under a condition.

    Args:
      document: a study's JSON.
      criterion: as in its TOML.
      model: the name of one of the study's models.
      condition: the name of a condition that the model is trained under.
    """
    cell = {"model": model, "condition": condition, **_verdict(NOT_TESTABLE, "")}
    runs = doc.group(document, model, condition)
    platform = (document.get("machine") or {}).get("platform", "cpu")
    if criterion.get("needs") == "gpu" and platform not in ("gpu", "cuda", "rocm"):
        found = _verdict(NOT_TESTABLE, criterion.get("why") or "it needs a GPU")
    elif not runs:
        found = _verdict(NOT_TESTABLE, "no run was made yet")
    elif criterion.get("kind") == "abort":
        found = _by_aborts(document, criterion, runs)
    elif doc.is_any(criterion["metric"], doc.EVENTS):
        found = _by_every_run(document, criterion, runs)
    else:
        base = doc.reference(document, condition)
        found = _by_interval(document, criterion, runs, model, base)
    return cell | found


def answer(document: Document, criteria: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts in one sentence.

    Args:
      document: a study's JSON.
      criteria: what :func:`verdicts` found.
    """
    done, planned = len(doc.finished(document)), len(doc.planned(document))
    if not done:
        return f"No answer yet: none of {planned} runs was made."
    start = f"So far, after {done} of {planned} runs: " if done < planned else ""
    parts = _success(document, [c for c in criteria if c["kind"] == "success"])
    parts += _failure(document, [c for c in criteria if c["kind"] == "failure"])
    stopped = [c for c in criteria if c["kind"] == "abort" and c["verdict"] == MISSED]
    if stopped:
        parts.append(f"{_count(stopped, 'abort criterion')} stopped runs")
    text = start + ("; ".join(parts) or "the study has no criteria") + "."
    return text[:1].upper() + text[1:]


def _judged(document: Document, criterion: Criterion) -> dict[str, Any]:
    cells = [
        judge(document, criterion, model, condition)
        for model in doc.models(document)
        if model in criterion.get("models", [model])
        for condition in doc.conditions(document, model)
        if _concerns(document, criterion, condition)
    ]
    kind = criterion.get("kind", "success")
    verdict, why = _overall(kind, cells)
    return {
        "name": criterion["name"],
        "kind": kind,
        "verdict": verdict,
        "why": why,
        "cells": cells,
    }


def _concerns(document: Document, criterion: Criterion, condition: str) -> bool:
    if "conditions" in criterion:
        return condition in criterion["conditions"]
    if criterion.get("kind") == "abort":
        return True
    return doc.reference(document, condition) is not None


def _overall(kind: str, cells: Sequence[Cell]) -> tuple[str, str]:
    """Success must hold everywhere; a failure is met where it happened once."""
    if not cells:
        return NOT_TESTABLE, "it concerns no condition of this study"
    decisive = MET if kind == "failure" else MISSED
    for verdict in (decisive, NOT_TESTABLE):
        found = [cell for cell in cells if cell["verdict"] == verdict]
        if not found:
            continue
        reasons = {cell["why"] for cell in found}
        if len(reasons) == 1 and len(found) == len(cells):
            return verdict, reasons.pop()
        where = _cases(found) if len(found) < len(cells) else "every case"
        return verdict, f"{where}: {found[0]['why']}" if len(found) == 1 else where
    return (MISSED if kind == "failure" else MET), "every case"


def _cases(cells: Sequence[Cell], most: int = 4) -> str:
    """Which they are, while few."""
    if len(cells) > most:
        names = list(dict.fromkeys(cell["condition"] for cell in cells))
        of = f": {listed(names)}" if len(names) <= most else ""
        return f"{len(cells)} cases{of}"
    return listed([f"{cell['condition']} on {cell['model']}" for cell in cells])


def _by_aborts(
    document: Document, criterion: Criterion, runs: Mapping[int, Run]
) -> Cell:
    """Met where the criterion stopped none of the runs."""
    alone = sum(other.get("kind") == "abort" for other in _criteria(document)) == 1
    stopped = [
        run
        for run in runs.values()
        if run.get("status") == "aborted"
        and (alone or criterion["name"] in (run.get("reason") or ""))
    ]
    if stopped:
        return _verdict(MISSED, f"it stopped {_named(stopped)}", seeds=len(runs))
    return _unless_missing(document, runs, "it stopped no run")


def _by_every_run(
    document: Document, criterion: Criterion, runs: Mapping[int, Run]
) -> Cell:
    """Of accidents each one counts: their mean over seeds says nothing."""
    metric = criterion["metric"]
    values = {seed: doc.value(run, metric) for seed, run in runs.items()}
    within = [
        runs[s] for s, v in values.items() if v is not None and _holds(criterion, v)
    ]
    outside = [
        runs[s] for s, v in values.items() if v is not None and not _holds(criterion, v)
    ]
    if not within and not outside:
        return _verdict(NOT_TESTABLE, _unknown(metric, list(runs.values())))
    found = doc.known(list(values.values()))

    def named(some: Sequence[Run]) -> str:
        if metric == "diverged":
            return _named(some)
        return listed(
            [f"seed {r['seed']}: {amount(metric, doc.value(r, metric))}" for r in some]
        )

    numbers = {
        "mean": sum(found) / len(found),
        "low": min(found),
        "high": max(found),
        "seeds": len(found),
    }
    if criterion.get("kind") == "failure":
        if within:
            return _verdict(MET, named(within), **numbers)
        return _unless_missing(document, runs, "in no run", MISSED) | numbers
    if outside:
        return _verdict(MISSED, named(outside), **numbers)
    return _unless_missing(document, runs, "in every run") | numbers


def _by_interval(
    document: Document,
    criterion: Criterion,
    runs: Mapping[int, Run],
    model: str,
    reference: str | None,
) -> Cell:
    metric, compare = criterion["metric"], criterion.get("compare", "value")
    bases: Mapping[int, Run] = {}
    if compare != "value":
        if reference is None:
            return _verdict(NOT_TESTABLE, "the condition has no reference")
        bases = doc.group(document, model, reference)
        if not bases:
            return _verdict(NOT_TESTABLE, f"no run of its reference, {reference}")
    fair = {s: r for s, r in runs.items() if s not in bases or not doc.broken(bases[s])}
    if doc.is_any(metric, doc.QUALITY):
        fell = [run for run in fair.values() if _fell(run, metric)]
        if fell:
            bad = MET if criterion.get("kind") == "failure" else MISSED
            return _verdict(bad, _named(fell), seeds=len(runs))
        if not fair:
            return _verdict(NOT_TESTABLE, f"every run of {reference} broke down")
    elif metric == "seconds":  # a run that was stopped takes less time
        fair = doc.whole(fair)
        if not fair:
            return _verdict(NOT_TESTABLE, f"no whole run: {_named(runs.values())}")
    else:
        fair = runs
    values = doc.known(
        [doc.compared(run, bases.get(s), metric, compare) for s, run in fair.items()]
    )
    if not values:
        return _verdict(
            NOT_TESTABLE, _unknown(metric, [*fair.values(), *bases.values()])
        )
    missing = len(doc.seeds(document)) - len(values)
    note = f" ({_seeds(missing)} missing)" if missing > 0 else ""
    return _decided(criterion, values, note)


def _decided(criterion: Criterion, values: Sequence[float], note: str) -> Cell:
    """A verdict from the compared values of one or more seeds."""
    metric, compare = criterion["metric"], criterion.get("compare", "value")
    found = interval(values)
    if doc.is_any(metric, doc.EXACT):
        found = found._replace(low=min(values), high=max(values))
    numbers = {
        "mean": found.mean,
        "low": _number(found.low),
        "high": _number(found.high),
        "seeds": len(values),
    }
    seen = change(metric, compare, found.mean)
    if math.isnan(found.low):
        why = f"one seed, {seen}, says nothing of others{note}"
        return _verdict(NOT_TESTABLE, why, **numbers)
    ends = span(metric, compare, found.low, found.high)
    least, most = _bounds(criterion)
    inside = found.low >= least and found.high <= most
    if inside or found.low > most or found.high < least:
        why = seen if found.low == found.high else f"{seen} {ends}"
        return _verdict(MET if inside else MISSED, why + note, **numbers)
    nearest = min((least, most), key=lambda bound: abs(found.mean - bound))
    needed = seeds_to_decide(found, nearest)
    about = "more than 1000 seeds" if needed is None else f"about {needed} seeds"
    why = (
        f"{seen}, but the {100 * CONFIDENCE:.0f} % interval {ends} holds the bound; "
        f"{about} would decide{note}"
    )
    return _verdict(NOT_TESTABLE, why, **numbers, seeds_to_decide=needed)


def _bounds(criterion: Criterion) -> tuple[float, float]:
    least = criterion.get("at_least", -math.inf)
    most = criterion.get("at_most", math.inf)
    return least - SLACK * abs(least), most + SLACK * abs(most)


def _holds(criterion: Criterion, value: float) -> bool:
    least, most = _bounds(criterion)
    return least <= value <= most


def _verdict(verdict: str, why: str, **numbers: Any) -> Cell:
    unknown = dict.fromkeys(("mean", "low", "high", "seeds_to_decide"))
    return {"verdict": verdict, "why": why, "seeds": 0, **unknown, **numbers}


def _unless_missing(
    document: Document, runs: Mapping[int, Run], why: str, verdict: str = MET
) -> Cell:
    """A verdict that needs every run: those that are missing could change it."""
    unknown = [run for run in runs.values() if run.get("summary") is None]
    missing = len(doc.seeds(document)) - len(runs)
    if unknown:
        why = f"{why} that was finished, but {_named(unknown)}"
        return _verdict(NOT_TESTABLE, why, seeds=len(runs))
    if missing > 0:
        why = f"{why} so far; {_seeds(missing)} missing"
        return _verdict(NOT_TESTABLE, why, seeds=len(runs))
    return _verdict(verdict, why, seeds=len(runs))


def _fell(run: Run, metric: str) -> bool:
    """Whether a run broke down before it could show its quality."""
    value = doc.value(run, metric)
    return doc.broken(run) or (value is not None and not math.isfinite(value))


def _named(runs: Iterable[Run]) -> str:
    """Seeds, and what became of them."""
    return listed(
        [
            f"seed {run['seed']} {run.get('status', 'done')}"
            + (f" ({run['reason']})" if run.get("reason") else "")
            for run in runs
        ]
    )


def _unknown(metric: str, runs: Iterable[Run]) -> str:
    failed = [run for run in runs if run.get("status") == "failed"]
    return _named(failed) if failed else f"no run knows {metric} here"


def _seeds(count: int) -> str:
    return "1 seed is" if count == 1 else f"{count} seeds are"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _criteria(document: Document) -> Sequence[Criterion]:
    return document["study"].get("criteria", [])


def _success(document: Document, criteria: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many hold, what does not, and which conditions miss nothing."""
    if not criteria:
        return []
    by = {v: [c for c in criteria if c["verdict"] == v] for v in (MET, MISSED)}
    undecided = [c for c in criteria if c["verdict"] == NOT_TESTABLE]
    parts = []
    if by[MET]:
        everywhere = "" if len(by[MET]) == len(criteria) else f" of {len(criteria)}"
        count = _count(by[MET], "success criterion", everywhere)
        parts.append(f"{count} {_are(by[MET])} met by every condition")
    for criterion in by[MISSED][:3]:
        who = _who(document, criterion, MISSED)
        parts.append(f"“{criterion['name']}” is missed by {who}")
    if more := by[MISSED][3:]:
        parts.append(f"{len(more)} more {_are(more)} missed")
    if undecided:
        count = _count(undecided, "success criterion")
        parts.append(f"{count} {_are(undecided)} not testable here")
    clean = _clean(document, criteria)
    if by[MISSED] and clean:
        titles = [doc.title(document, "conditions", name) for name in clean]
        who = listed(titles) if len(clean) < 3 else f"{len(clean)} conditions"
        parts.append(f"{who} miss{'es' if len(clean) == 1 else ''} none")
    return parts


def _failure(document: Document, criteria: Sequence[Mapping[str, Any]]) -> list[str]:
    if not criteria:
        return []
    happened = [c for c in criteria if c["verdict"] == MET]
    undecided = [c for c in criteria if c["verdict"] == NOT_TESTABLE]
    parts = [
        f"failure criterion “{c['name']}” is met by {_who(document, c, MET)}"
        for c in happened
    ]
    if not happened and not undecided:
        parts.append("no failure criterion is met")
    elif undecided:
        count = _count(undecided, "failure criterion")
        parts.append(f"{count} {_are(undecided)} not testable here")
    return parts


def _clean(document: Document, criteria: Sequence[Mapping[str, Any]]) -> list[str]:
    """Conditions that meet something and miss nothing."""
    seen = collections.defaultdict(set)
    for criterion in criteria:
        for cell in criterion["cells"]:
            seen[cell["condition"]].add(cell["verdict"])
    order = document["study"]["conditions"]
    return [c for c in order if MET in seen[c] and MISSED not in seen[c]]


def _who(document: Document, criterion: Mapping[str, Any], verdict: str) -> str:
    """The conditions with a verdict on some model, by title while few."""
    cells = criterion["cells"]
    names = dict.fromkeys(c["condition"] for c in cells if c["verdict"] == verdict)
    count = len({cell["condition"] for cell in cells})
    if 1 < len(names) == count:
        return "every condition"
    if len(names) > 2:
        return f"{len(names)} of {count} conditions"
    return listed([doc.title(document, "conditions", name) for name in names])


def _are(criteria: Sequence[Any]) -> str:
    return "is" if len(criteria) == 1 else "are"


def _count(criteria: Sequence[Any], noun: str, of: str = "") -> str:
    many = noun.replace("criterion", "criteria")
    count = len(criteria)
    if of:
        return f"{count}{of} {many}"
    return f"{count} {noun if count == 1 else many}"
