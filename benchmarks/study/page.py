"""A study's report, made from study.json alone.

One HTML page holds everything. A summary in Markdown holds the verdicts and the means,
and a JSON beside it the numbers of each run.
"""

import base64
import html
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import summaries

from . import document as doc
from .comparisons import comparisons
from .costs import costs
from .document import Document
from .plots import plots, units
from .statistics import CONFIDENCE
from .verdicts import MET, MISSED, answer, verdicts
from .wording import (
    amount,
    bounds,
    change,
    duration,
    label,
    number,
    percent,
    span,
)

STYLE = pathlib.Path(__file__).with_name("page.css")
KINDS = {
    "success": ("Success criteria", "What must hold."),
    "failure": ("Failure criteria", "Met: the bad thing happened."),
    "abort": ("Abort criteria", "Met: no run had to be stopped."),
}
HAPPENED = {MET: f"{MET}: it happened", MISSED: f"{MISSED}: it did not happen"}
RELATIVE = ("bytes", "peak_bytes", "checkpoint_bytes", "units_per_second")
RELATIVE += ("seconds", "step_seconds", "gradient_norm")
"""Metrics whose changes read best as shares of the reference."""
PERCENT = f"{100 * CONFIDENCE:.0f} %"
METHOD = f"""\
A seed decides the first weights and the data, the same for all conditions, so runs are
compared in pairs with the reference's run of the same seed. Intervals are Student's,
{PERCENT}, of the mean difference. Effect: mean difference over the differences'
standard deviation, with Hedges' correction for few pairs, so it is known from three
seeds on. p: paired t-test, two-sided; adjusted with Holm's method over all {{count}}
tests of this study. Verdicts follow the intervals alone: met where all of the interval
lies within the bound, missed where all lies outside, not testable here where it holds
the bound. Bytes are counted, not estimated, and have no spread; of
NaN and divergence every run counts."""


MEANS = f"""\
Means over seeds. Below a mean stands the paired difference to the run of the
reference from the same seed, then its {PERCENT} interval of Student's t."""


def report(folder: pathlib.Path, summary: pathlib.Path) -> None:
    """Makes the page of a study again, ``index.html`` beside its ``study.json``.

    The statistics, the verdicts and the costs are added to ``study.json`` as "results".

    Args:
      folder: of the study's results.
      summary: the Markdown file to write; the numbers of all runs go beside it.

    Raises:
      FileNotFoundError: no study.json in it.
    """
    source = pathlib.Path(folder) / "study.json"
    document = json.loads(source.read_text())
    document["results"] = results(document)
    _write(source, json.dumps(document, indent=1) + "\n")
    _write(source.with_name("index.html"), page(document))
    summary.parent.mkdir(parents=True, exist_ok=True)
    _write(summary, markdown(document))
    summaries.write(summary.with_suffix(".json"), numbers(document))


def results(document: Document) -> dict[str, Any]:
    """All that is computed from the runs: what study.json has as "results".

    Args:
      document: a study's JSON; its own "results" are not looked at.

    Returns:
      "finished" and "planned" (how many runs), "answer", "criteria" (see
      :func:`verdicts.verdicts`), "comparisons" (see :func:`comparisons.comparisons`)
      and "costs" (see :func:`costs.costs`).
    """
    criteria = verdicts(document)
    return {
        "finished": len(doc.finished(document)),
        "planned": len(doc.planned(document)),
        "answer": answer(document, criteria),
        "criteria": criteria,
        "comparisons": comparisons(document),
        "costs": costs(document),
    }


def markdown(document: Document) -> str:
    """The summary: the question's answer, the table of verdicts, and all means.

    Args:
      document: a study's JSON with its "results".
    """
    study, found = document["study"], document["results"]
    machine = document.get("machine") or {}
    lines = [
        f"# {study.get('title', study['name'])}",
        "",
        f"`{_command(document)}`: {machine.get('device')}, jax {machine.get('jax')}, "
        f"{document.get('date')}, {found['finished']} of {found['planned']} runs.",
        "",
        found["answer"],
        "",
        "| criterion | asked | verdict | |",
        "|---|---|---|---|",
    ]
    for criterion, asked in zip(found["criteria"], _asked(document), strict=True):
        cells = (criterion["name"], asked, criterion["verdict"], criterion["why"])
        lines.append(_markdown_row(cells))
    lines += ["", MEANS]
    for model in doc.models(document):
        rows = [r for r in found["comparisons"] if r["model"] == model]
        lines += ["", f"## {doc.title(document, 'models', model)}", ""]
        lines += [f"{_size(document, model)}.", "", *_markdown_means(document, rows)]
    return "\n".join(lines) + "\n"


def _markdown_means(
    document: Document, rows: Sequence[Mapping[str, Any]]
) -> Iterable[str]:
    """Metrics x conditions."""
    if not rows:
        return
    at = {(row["condition"], row["metric"]): row for row in rows}
    names = list(dict.fromkeys(row["condition"] for row in rows))
    unit = units(document, rows[0]["model"])
    yield _markdown_row(["metric", *[f"`{name}`" for name in names]])
    yield "|---" + "|---:" * len(names) + "|"
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells = [_overview_lines(at.get((name, metric)), unit) for name in names]
        yield _markdown_row([label(metric), *map("<br>".join, cells)])


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def numbers(document: Document) -> dict[str, Any]:
    """What each run came to, without its curves and options."""
    names = ("model", "condition", "seed", "status", "summary")
    return {
        "command": _command(document),
        "machine": document.get("machine"),
        "date": document.get("date"),
        "runs": [
            {name: run[name] for name in names if name in run}
            for run in doc.finished(document)
        ],
    }


def page(document: Document) -> str:
    """The whole page, of a document with its "results"."""
    study, found = document["study"], document["results"]
    title = study.get("title", study["name"])
    body = [
        tag("h1", text(title)),
        _state(document),
        paragraphs(study.get("question")),
        tag("div", tag("p", text(found["answer"])), class_="answer"),
        section("Verdicts", *_verdict_tables(document)),
        section("Setting", _setting(document), _conditions(document)),
        *[_model(document, model) for model in doc.models(document)],
        section("Costs", *_costs(document)),
        section("Events", _events(document), _changes(document)),
        section("How numbers are compared", paragraphs(_method(found["comparisons"]))),
        section("What this study cannot say", paragraphs(study.get("limits"))),
        section("Make it again", _again(document)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', text(title))}\n<style>\n{STYLE.read_text()}</style>\n"
        f"</head>\n<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


# What HTML is made of.


def text(value: Any) -> str:
    """Escaped."""
    return html.escape(str(value))


def tag(name: str, content: str, **attributes: str) -> str:
    """An element; ``class_`` is its class."""
    given = "".join(
        f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items()
    )
    return f"<{name}{given}>{content}</{name}>"


def section(heading: str, *parts: str) -> str:
    """Nothing at all where all parts are empty."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    return f"<section>\n{tag('h2', text(heading))}\n{content}\n</section>\n"


def paragraphs(value: str | None) -> str:
    """A text whose paragraphs empty lines separate."""
    parts = [part.strip() for part in (value or "").split("\n\n")]
    return "\n".join(tag("p", text(part)) for part in parts if part)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    numbers: Sequence[int] = (),
) -> str:
    """A table of cells that are HTML; the first of a row is its heading.

    Args:
      head: of the columns.
      rows: as long as the head.
      caption: plain text.
      numbers: columns set flush right.
    """

    def cells(name: str, row: Sequence[str]) -> str:
        made = []
        for i, content in enumerate(row):
            scope = {"scope": "col"} if name == "th" else {}
            if name == "td" and i == 0:
                made.append(tag("th", content, scope="row"))
                continue
            look = {"class_": "n"} if i in numbers else {}
            made.append(tag(name, content, **scope, **look))
        return tag("tr", "".join(made))

    top = tag("caption", text(caption)) if caption else ""
    body = "\n".join(cells("td", row) for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table>{top}\n'
        f"<thead>{cells('th', head)}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def chip(kind: str, verdict: str) -> str:
    """A verdict in colour, for a failure criterion the other way round."""
    good, bad = (MISSED, MET) if kind == "failure" else (MET, MISSED)
    look, mark = {good: ("good", "✓"), bad: ("bad", "✗")}.get(verdict, ("open", "?"))
    words = HAPPENED.get(verdict, verdict) if kind == "failure" else verdict
    return tag("span", f"{mark} {text(words)}", class_=f"chip {look}")


# The parts of the page.


def _state(document: Document) -> str:
    found, machine = document["results"], document.get("machine") or {}
    words = [
        document.get("date"),
        f"preset {document['preset']}",
        machine.get("device"),
    ]
    line = " · ".join(str(word) for word in words if word)
    runs = f"{found['finished']} of {found['planned']} runs"
    if found["finished"] < found["planned"]:
        warning = f"Unfinished: {runs} were made. Verdicts may still change."
        return tag("p", text(line), class_="note") + tag(
            "p", text(warning), class_="unfinished"
        )
    return tag("p", text(f"{line} · {runs}"), class_="note")


def _asked(document: Document) -> list[str]:
    return [bounds(criterion) for criterion in document["study"].get("criteria", [])]


def _verdict_tables(document: Document) -> list[str]:
    """One row for each criterion, for each kind; then each with all its cases."""
    found = list(zip(document["results"]["criteria"], _asked(document), strict=True))
    parts = []
    for kind, (heading, note) in KINDS.items():
        rows = [
            [
                text(criterion["name"]),
                text(asked),
                chip(kind, criterion["verdict"]),
                text(criterion["why"]),
            ]
            for criterion, asked in found
            if criterion["kind"] == kind
        ]
        if rows:
            parts.append(tag("h3", f"{heading} {tag('small', text(note))}"))
            parts.append(table(["Criterion", "Asked", "Verdict", "Where"], rows))
    rows = [
        [
            text(criterion["name"]),
            text(cell["model"]),
            text(cell["condition"]),
            chip(criterion["kind"], cell["verdict"]),
            text(cell["why"]),
        ]
        for criterion, _ in found
        for cell in criterion["cells"]
    ]
    if rows:
        head = ["Criterion", "Model", "Condition", "Verdict", "Why"]
        parts.append(_details(f"All {len(rows)} cases, and why", table(head, rows)))
    return parts


def _details(heading: str, content: str) -> str:
    return tag("details", tag("summary", text(heading)) + content)


def _setting(document: Document) -> str:
    machine = document.get("machine") or {}
    seeds = ", ".join(str(seed) for seed in doc.seeds(document))
    entries = {
        "Device": machine.get("device"),
        "Cores": machine.get("cores"),
        "Software": ", ".join(
            f"{name} {machine[name]}" for name in ("jax", "python") if machine.get(name)
        ),
        "Date": document.get("date"),
        "Preset": document["preset"],
        "Seeds": seeds,
        "Command": document.get("command"),
    }
    items = [
        tag("dt", text(name)) + tag("dd", text(entry))
        for name, entry in entries.items()
        if entry
    ]
    return tag("dl", "\n".join(items))


def _conditions(document: Document) -> str:
    """What the short names of plots and tables stand for."""
    study = document["study"]
    rows = []
    for name, condition in study["conditions"].items():
        options = [_options(condition.get("config"))] + [
            f"{model}: {_options(own)}"
            for model, own in (condition.get("by_model") or {}).items()
        ]
        rows.append(
            [
                tag("code", text(name)),
                text(condition.get("title", name)),
                text("; ".join(option for option in options if option)),
                tag("code", text(doc.reference(document, name) or "")),
            ]
        )
    head = ["Condition", "What it is", "Options", "Compared with"]
    return table(head, rows, caption="Conditions")


def _options(config: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} = {value}" for key, value in (config or {}).items())


def _model(document: Document, model: str) -> str:
    rows = [r for r in document["results"]["comparisons"] if r["model"] == model]
    made = [run for run in doc.finished(document) if run["model"] == model]
    parts = [tag("p", text(_size(document, model)), class_="note")]
    if not made:
        return section(
            doc.title(document, "models", model), tag("p", "No run was made yet.")
        )
    parts += [
        _matrix(document, model),
        _overview(document, model, rows),
        tag("div", "\n".join(_figures(document, model, rows)), class_="plots"),
        _details("All comparisons", _long_table(document, model, rows)),
    ]
    return section(doc.title(document, "models", model), *parts)


def _size(document: Document, model: str) -> str:
    made = [run for run in doc.finished(document) if run["model"] == model]
    planned = sum(key[0] == model for key in doc.planned(document))
    counts = {doc.value(run, "parameters") for run in made} - {None}
    steps = {(run.get("config") or {}).get("steps") for run in made} - {None}
    words = [f"{model}: {len(made)} of {planned} runs"]
    words += [f"{count:,.0f} parameters" for count in counts if len(counts) == 1]
    words += [f"{step:,} steps" for step in steps if len(steps) == 1]
    return ", ".join(words)


def _matrix(document: Document, model: str) -> str:
    """Criteria x conditions, for the eye."""
    written = document["study"].get("criteria", [])
    found = [
        (own, {c["condition"]: c for c in judged["cells"] if c["model"] == model})
        for own, judged in zip(written, document["results"]["criteria"], strict=True)
        if judged["kind"] != "abort"
    ]
    names = [
        name
        for name in doc.conditions(document, model)
        if any(name in cells for _, cells in found)
    ]
    rows = [
        [text(own["name"]), *[_matrix_cell(own, cells.get(name)) for name in names]]
        for own, cells in found
        if cells
    ]
    head = ["Criterion", *[tag("code", text(name)) for name in names]]
    if not rows:
        return ""
    made = table(head, rows, caption="Verdicts by condition")
    return tag("div", made, class_="matrix")


def _matrix_cell(criterion: Mapping[str, Any], cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    compare = criterion.get("compare", "value")
    seen = change(criterion["metric"], compare, cell["mean"])
    below = "" if cell["mean"] is None else tag("small", text(seen))
    return chip(criterion.get("kind", "success"), cell["verdict"]) + below


def _overview(document: Document, model: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Conditions x metrics: means, and below them the change with its interval."""
    at = {(row["condition"], row["metric"]): row for row in rows}
    metrics = dict.fromkeys(row["metric"] for row in rows)
    names = [
        name
        for name in doc.conditions(document, model)
        if any(row["condition"] == name for row in rows)
    ]
    unit = units(document, model)
    return table(
        ["Metric", *[tag("code", text(name)) for name in names]],
        [
            [
                text(label(metric)),
                *[_overview_cell(at.get((name, metric)), unit) for name in names],
            ]
            for metric in metrics
        ],
        caption="Means over seeds; below, the paired difference to the reference and "
        f"its {PERCENT} interval",
        numbers=range(1, len(names) + 1),
    )


def _overview_cell(row: Mapping[str, Any] | None, unit: str) -> str:
    lines = _overview_lines(row, unit)
    return "".join(lines[:1]) + "".join(tag("small", line) for line in lines[1:])


def _overview_lines(row: Mapping[str, Any] | None, unit: str) -> list[str]:
    """A mean, its difference to the reference, and that one's interval, escaped."""
    if row is None:
        return []
    metric = row["metric"]
    lines = [amount(metric, row["mean"], unit)]
    compare, found = _shown(row)
    if found is not None:
        lines.append(change(metric, compare, found["mean"]))
        if found["low"] is not None and found["low"] != found["high"]:
            lines.append(span(metric, compare, found["low"], found["high"]))
    return list(map(text, lines))


def _shown(row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """A row's difference, or where that reads better the change as a share."""
    relative = row["metric"].split(".")[0] in RELATIVE and row["relative"]
    compare = "relative" if relative else "difference"
    return compare, row[compare]


def _long_table(
    document: Document, model: str, rows: Sequence[Mapping[str, Any]]
) -> str:
    unit = units(document, model)
    body = []
    for row in rows:
        compare, found = _shown(row)
        ends = found and found["low"] is not None
        body.append(
            [
                text(label(row["metric"])),
                tag("code", text(row["condition"])),
                text(amount(row["metric"], row["mean"], unit)),
                text(row["seeds"]),
                ""
                if not found
                else text(change(row["metric"], compare, found["mean"])),
                text(span(row["metric"], compare, found["low"], found["high"]))
                if ends
                else "",
                "" if row["effect"] is None else text(number(row["effect"], 2)),
                _p(row["p"]),
                _p(row["p_adjusted"]),
            ]
        )
    head = ["Metric", "Condition", "Mean", "Seeds", "Difference", "Interval"]
    head += ["Effect", "p", "p, adjusted"]
    return table(head, body, numbers=range(2, 9))


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _figures(
    document: Document, model: str, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    made = []
    for plot in plots(document, model, rows):
        data = base64.b64encode(plot.svg.encode()).decode()
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{text(plot.alt)}">'
        caption = text(plot.title) + tag("small", text(plot.note))
        made.append(tag("figure", tag("figcaption", caption) + image))
    return made


def _costs(document: Document) -> list[str]:
    found = document["results"]["costs"]
    price = found["dollars_per_hour"]
    total = found["study"]
    if price is None:
        says = found["why"]
        whole = f"All runs together took {duration(total['seconds'])}."
    else:
        says = (
            f"Assumed, not measured: ${price:.2f} for an hour of this device "
            f"({found['assumption']}; benchmarks/study/costs.toml)."
        )
        whole = (
            f"All runs together took {duration(total['seconds'])}: "
            f"${total['dollars']:.2f}."
        )
    rows = [
        [
            text(row["model"]),
            tag("code", text(row["condition"])),
            text(duration(row["seconds"])),
            *([] if price is None else [text(_dollars(row["dollars"]))]),
            _saved(row["saved"]),
        ]
        for row in found["conditions"]
        if row["seeds"]
    ]
    if not rows:
        return [tag("p", text(says))]
    head = ["Model", "Condition", "Train time of a run"]
    head += ([] if price is None else ["Cost of a run"]) + ["Saved against reference"]
    return [
        tag("p", text(f"{says} {whole}")),
        table(head, rows, numbers=range(2, len(head))),
    ]


def _dollars(value: float) -> str:
    return f"${value:.2f}" if value >= 1 else f"${number(value, 2)}"


def _saved(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    mean = text(percent(found["mean"]))
    if found["low"] is None:
        return mean
    ends = span("seconds", "relative", found["low"], found["high"])
    return mean + tag("small", text(ends))


def _events(document: Document) -> str:
    """Runs that did not go through, and steps with NaN or infinity."""
    rows = []
    for run in doc.finished(document):
        count = doc.value(run, "nonfinite") or 0
        status = run.get("status", "done")
        if status == "done" and not count and not doc.broken(run):
            continue
        reason = run.get("reason") or ""
        if count:
            steps = (
                f"{count:.0f} {'step' if count == 1 else 'steps'} with NaN or infinity"
            )
            reason = f"{reason}; {steps}" if reason else steps
        rows.append(
            [
                text(run["model"]),
                tag("code", text(run["condition"])),
                text(run["seed"]),
                text(status),
                text(reason),
            ]
        )
    if not rows:
        return tag(
            "p", "None: no run diverged, was stopped or failed; no NaN, no infinity."
        )
    return table(["Model", "Condition", "Seed", "What happened", "Why"], rows)


def _changes(document: Document) -> str:
    """Criteria that were altered when runs were there already."""
    rows = [
        [
            text(altered["criterion"]),
            text(f"{altered['date']}, after {altered['runs']} runs"),
            text(bounds(altered["before"]) if altered["before"] else "was not there"),
            text(bounds(altered["after"]) if altered["after"] else "was taken away"),
        ]
        for altered in document.get("changes") or []
    ]
    if not rows:
        return ""
    head = ["Criterion", "When", "Before", "After"]
    caption = "Criteria that were changed after runs had been made"
    return table(head, rows, caption=caption)


def _method(rows: Sequence[Mapping[str, Any]]) -> str:
    return METHOD.format(count=sum(row["p"] is not None for row in rows))


def _again(document: Document) -> str:
    return (
        tag("pre", tag("code", text(_command(document))))
        + '<p>All numbers: <a href="study.json">study.json</a>, beside this page.</p>'
    )


def _command(document: Document) -> str:
    name, preset = document["study"]["name"], document["preset"]
    return document.get("command") or (
        f"python -m benchmarks.study run benchmarks/study/studies/{name}.toml "
        f"--preset {preset}"
    )


def _write(path: pathlib.Path, content: str) -> None:
    """All of it, or what was there before."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(content)
    os.replace(draft, path)
