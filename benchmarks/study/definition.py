"""What a study asks: its TOML file, checked whole before the first run starts."""

import difflib
import functools
import importlib
import math
import pathlib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from examples.common.config import from_mapping

TRAINERS = ("lm", "vision", "trading")
KINDS = ("success", "failure", "abort")
COMPARISONS = ("relative", "difference", "ratio", "value")
METRICS = (
    "parameters",
    "bytes.weights",
    "bytes.residual",
    "bytes.optimizer state",
    "bytes.gradients",
    "peak_bytes.live",
    "peak_bytes.compiled",
    "peak_bytes.allocator",
    "checkpoint_bytes",
    "seconds",
    "steps",
    "step_seconds",
    "units_per_second",
    "train_loss",
    "val_loss",
    "bytes_per_parameter",
    "gradient_norm",
    "nonfinite",
    "diverged",
)
"""Paths into the summary of any trainer."""
TRAINER_METRICS = {
    "lm": ("perplexity", "bits_per_byte"),
    "vision": ("accuracy",),
    "trading": ("sharpe", "max_drawdown", "annual_return"),
}
"""What a trainer has under "metrics". More is accepted of trainers of one's own."""
ROW_METRICS = ("loss", "grad_norm", "val_loss")
"""Keys of a row of the history, which abort criteria look at."""
RUNNERS_OWN = ("seed", "out", "resume", "stop_at")
"""Options that no study sets: the runner does."""

KEYS = {
    "study": (
        "name",
        "title",
        "question",
        "limits",
        "reference",
        "presets",
        "models",
        "conditions",
        "criteria",
    ),
    "preset": ("seeds", "workers", "needs"),
    "model": ("trainer", "title", "presets", "config"),
    "condition": ("title", "models", "config", "by_model", "reference"),
    "criterion": (
        "name",
        "kind",
        "metric",
        "compare",
        "at_most",
        "at_least",
        "after_step",
        "models",
        "conditions",
        "needs",
        "why",
    ),
}


class DefinitionError(ValueError):
    """All that is wrong with a study's file, a line each."""


@dataclass(frozen=True)
class Run:
    """One training: a condition on a model, from one seed.

    Attributes:
      model: its name in the study.
      condition: its name in the study.
      seed: of the first weights and the data.
      trainer: the module to import.
      config: all of the trainer's options, defaults among them.
    """

    model: str
    condition: str
    seed: int
    trainer: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.model}/{self.condition}/{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study under one of its presets.

    Attributes:
      content: the parsed TOML, without the models of other presets.
      preset: the name of the preset.
      workers: how many runs go at once.
      runs: the whole matrix, in the order in which it is worked off.
    """

    content: Mapping[str, Any]
    preset: str
    workers: int
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        return self.content["name"]

    def aborts(self, run: Run) -> list[Mapping[str, Any]]:
        """The criteria that may stop a run."""
        return [
            criterion
            for criterion in self.content.get("criteria", ())
            if criterion["kind"] == "abort"
            and run.model in criterion.get("models", [run.model])
            and run.condition in criterion.get("conditions", [run.condition])
        ]


def read(path: pathlib.Path, preset: str) -> Study:
    """The study of a TOML file.

    Raises:
      DefinitionError: the file is missing or not TOML, or asks for what there is not:
        all mistakes at once, with the closest names.
    """
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        others = sorted(str(file) for file in path.parent.glob("*.toml"))
        there = f"; there are {', '.join(others)}" if others else ""
        raise DefinitionError(f"there is no file {path}{there}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DefinitionError(f"{path} is not TOML: {error}") from None
    problems: list[str] = []
    _check_study(content, path, preset, problems)
    if not problems:
        content = _of_preset(content, preset)
        if not content["models"]:
            problems.append(f"no model has the preset {preset!r}")
    runs = [] if problems else _matrix(content, preset, problems)
    if problems:
        raise DefinitionError("\n".join(f"{path}: {problem}" for problem in problems))
    workers = content["presets"][preset].get("workers", 1)
    return Study(content, preset, workers, runs)


def trainer_module(name: str) -> str:
    """The module of a trainer: one of examples/, or any other by its dotted name."""
    return name if "." in name else f"examples.{name}.train"


def _of_preset(content: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """The study without models of other presets, and without what is only theirs."""
    models = {
        name: model
        for name, model in content["models"].items()
        if preset in model.get("presets", [preset])
    }

    def without(entry: Mapping[str, Any]) -> dict[str, Any]:
        entry = dict(entry)
        if "models" in entry:
            entry["models"] = [name for name in entry["models"] if name in models]
        return entry

    conditions = {
        name: without(condition) for name, condition in content["conditions"].items()
    }
    criteria = [without(criterion) for criterion in content["criteria"]]
    return {
        **content,
        "models": models,
        "conditions": {
            name: condition
            for name, condition in conditions.items()
            if condition.get("models", [...])
        },
        "criteria": [x for x in criteria if x.get("models", [...])],
    }


def _matrix(content: Mapping[str, Any], preset: str, problems: list[str]) -> list[Run]:
    """All runs. What is compared runs side by side: for each seed and model all
    conditions in turn, each seed beginning with another one, so that neither a busy
    hour nor a place in the order belongs to one condition."""
    configs, trainers = {}, {}
    for model_name, model in content["models"].items():
        trainers[model_name] = trainer_module(model["trainer"])
        trainer = _import(model["trainer"], f"models.{model_name}", problems)
        if trainer is None:
            continue
        for condition_name in _conditions(content, model_name):
            condition = content["conditions"][condition_name]
            options = {
                **model.get("config", {}),
                **model.get(preset, {}),
                **condition.get("config", {}),
                **condition.get("by_model", {}).get(model_name, {}),
            }
            where = f"models.{model_name} with conditions.{condition_name}"
            taken = [name for name in RUNNERS_OWN if name in options]
            if taken:
                problems.append(f"{where}: {', '.join(taken)} are the runner's to set")
                continue
            try:
                config = from_mapping(trainer.Config, options, where)
            except ValueError as error:
                problems.append(str(error))
                continue
            configs[model_name, condition_name] = asdict(config)
    if problems:
        return []
    runs, seeds = [], content["presets"][preset]["seeds"]
    for i, seed in enumerate(seeds):
        for model in content["models"]:
            names = _conditions(content, model)
            first = i * len(names) // len(seeds)
            runs += [
                Run(
                    model,
                    condition,
                    seed,
                    trainers[model],
                    configs[model, condition] | {"seed": seed},
                )
                for condition in names[first:] + names[:first]
            ]
    return runs


def _conditions(content: Mapping[str, Any], model: str) -> list[str]:
    """Those of a model."""
    return [
        name
        for name, condition in content["conditions"].items()
        if model in condition.get("models", [model])
    ]


def _import(name: str, where: str, problems: list[str]) -> ModuleType | None:
    try:
        trainer = _imported(trainer_module(name))
    except ImportError as error:
        problems.append(
            f"{where}: trainer {name!r} cannot be imported: {error}. "
            'The trainers need pip install "optax_flash[examples]"'
        )
        return None
    if missing := [part for part in ("Config", "train") if not hasattr(trainer, part)]:
        problems.append(f"{where}: trainer {name!r} has no {' and no '.join(missing)}")
        return None
    return trainer


_imported = functools.cache(importlib.import_module)


# --- the parts of the file


def _check_study(content, path: pathlib.Path, preset: str, problems: list[str]) -> None:
    add = problems.append
    _check_keys(content, KEYS["study"], "", problems)
    for key in ("name", "title", "question", "reference"):
        if not isinstance(content.get(key), str) or not content.get(key):
            add(f"{key} is missing, a string")
    if content.get("name") not in (None, path.stem):
        add(f"name is {content['name']!r}, the file's is {path.stem!r}: give both one")
    tables = {}
    for key in ("presets", "models", "conditions"):
        table = content.get(key)
        if not isinstance(table, dict) or not table:
            add(f"there are no [{key}.NAME]")
            table = {}
        for name, entry in list(table.items()):
            if not isinstance(entry, dict):
                add(f"{key}.{name} is {entry!r}, not a table")
                table = {n: x for n, x in table.items() if n != name}
            elif not re.fullmatch(r"[\w.+-]+", name):
                add(f"{key}: {name!r} has more than letters, digits and _ . + -")
        tables[key] = table
    if problems:
        return
    presets, models, conditions = tables.values()
    _known(preset, presets, "--preset", "preset", problems)
    for name, entry in presets.items():
        _check_preset(name, entry, problems)
    for name, entry in models.items():
        _check_model(name, entry, presets, problems)
    _known(content["reference"], conditions, "reference", "condition", problems)
    for name, entry in conditions.items():
        _check_condition(name, entry, content, problems)
    criteria = content.get("criteria", [])
    if not isinstance(criteria, list) or not criteria:
        add("there are no [[criteria]]: what would be success, what failure?")
        return
    for i, entry in enumerate(criteria):
        _check_criterion(i, entry, content, problems)
    names = [entry.get("name") for entry in criteria]
    for name in {name for name in names if names.count(name) > 1}:
        add(f"criteria: the name {name!r} is there twice")


def _check_preset(name: str, entry: Mapping[str, Any], problems: list[str]) -> None:
    where = f"presets.{name}"
    _check_keys(entry, KEYS["preset"], where, problems)
    seeds = entry.get("seeds", [])
    if not _listed(seeds, int) or len(set(seeds)) != len(seeds):
        problems.append(f"{where}: seeds is {seeds!r}; give whole numbers, each once")
    workers = entry.get("workers", 1)
    if not _is(workers, int) or workers < 1:
        problems.append(f"{where}: workers is {workers!r}; give 1 or more")
    if entry.get("needs", "gpu") != "gpu":
        problems.append(f"{where}: needs is {entry['needs']!r}; it can be 'gpu'")


def _check_model(
    name: str,
    entry: Mapping[str, Any],
    presets: Iterable[str],
    problems: list[str],
) -> None:
    where = f"models.{name}"
    _check_keys(entry, (*KEYS["model"], *presets), where, problems)
    for key in ("config", *presets):
        if not isinstance(entry.get(key, {}), dict):
            problems.append(f"{where}: {key} is {entry[key]!r}, not a table of options")
    _check_names(entry, "presets", presets, "preset", where, problems)
    trainer = entry.get("trainer")
    if not isinstance(trainer, str):
        problems.append(f"{where}: trainer is missing: {_some(TRAINERS)}")
    elif "." not in trainer:
        _known(trainer, TRAINERS, f"{where}: trainer", "trainer", problems)


def _check_condition(
    name: str, entry: Mapping[str, Any], content: Mapping[str, Any], problems: list[str]
) -> None:
    where = f"conditions.{name}"
    models, conditions = content["models"], content["conditions"]
    _check_keys(entry, KEYS["condition"], where, problems)
    for key in ("config", "by_model"):
        if not isinstance(entry.get(key, {}), dict):
            problems.append(f"{where}: {key} is {entry[key]!r}, not a table")
            return
    _check_names(entry, "models", models, "model", where, problems)
    for model, options in entry.get("by_model", {}).items():
        _known(model, models, f"{where}: by_model", "model", problems)
        if not isinstance(options, dict):
            problems.append(f"{where}: by_model.{model} is {options!r}, not a table")
    reference = entry.get("reference", content["reference"])
    if not _known(reference, conditions, f"{where}: reference", "condition", problems):
        return
    there = conditions[reference].get("models", list(models))
    lacking = [m for m in entry.get("models", models) if m not in there]
    if lacking:
        problems.append(
            f"{where}: its reference {reference!r} does not run on {', '.join(lacking)}"
        )


def _check_criterion(
    i: int, entry: Any, content: Mapping[str, Any], problems: list[str]
) -> None:
    if not isinstance(entry, dict):
        problems.append(f"criteria {i + 1} is {entry!r}, not a table")
        return
    name = entry.get("name")
    where = f"criterion {name!r}" if name else f"criterion {i + 1}"
    add = problems.append
    _check_keys(entry, KEYS["criterion"], where, problems)
    if not isinstance(name, str) or not name:
        add(f"{where}: name is missing")
    kind = entry.get("kind")
    if not _known(kind, KINDS, f"{where}: kind", "kind", problems):
        return
    _check_names(entry, "models", content["models"], "model", where, problems)
    _check_names(
        entry, "conditions", content["conditions"], "condition", where, problems
    )
    bounds = [key for key in ("at_most", "at_least") if key in entry]
    if len(bounds) != 1 or not _is(entry[bounds[0]], (int, float)):
        add(f"{where}: give a number as one of at_most and at_least")
    elif not math.isfinite(entry[bounds[0]]):
        add(f"{where}: {bounds[0]} is {entry[bounds[0]]}; give a finite number")
    metric = entry.get("metric")
    if kind == "abort":
        _known(metric, ROW_METRICS, f"{where}: metric", "key of a row", problems)
        if not _is(entry.get("after_step", 0), int):
            add(f"{where}: after_step is {entry['after_step']!r}, not a step")
        if entry.get("compare", "value") != "value":
            add(f"{where}: an abort criterion compares a value, nothing else")
        return
    if "after_step" in entry:
        add(f"{where}: only abort criteria have after_step")
    _known(
        entry.get("compare"), COMPARISONS, f"{where}: compare", "comparison", problems
    )
    if entry.get("needs", "gpu") != "gpu":
        add(f"{where}: needs is {entry['needs']!r}; it can be 'gpu'")
    _check_metric(metric, entry, content, where, problems)


def _check_metric(metric, entry, content, where: str, problems: list[str]) -> None:
    """That every model of the criterion has the metric."""
    for name in entry.get("models", content["models"]):
        trainer = content["models"].get(name, {}).get("trainer")
        if not isinstance(trainer, str):
            continue
        if "." in trainer and str(metric).startswith("metrics."):
            continue
        known = (
            *METRICS,
            *(f"metrics.{key}" for key in TRAINER_METRICS.get(trainer, ())),
        )
        what = f"metric of models.{name}"
        if not _known(metric, known, f"{where}: metric", what, problems):
            return


# --- small checks


def _check_keys(entry, known: Sequence[str], where: str, problems: list[str]) -> None:
    for key in entry:
        if key not in known:
            prefix = f"{where}: " if where else ""
            problems.append(f"{prefix}{key!r} is not known; {_hint(key, known)}")


def _check_names(entry, key, known, what, where, problems: list[str]) -> None:
    names = entry.get(key)
    if names is None:
        return
    if not _listed(names, str):
        problems.append(f"{where}: {key} is {names!r}; give a list of names")
        return
    for name in names:
        _known(name, known, f"{where}: {key}", what, problems)


def _known(
    name: Any, known: Iterable[str], where: str, what: str, problems: list[str]
) -> bool:
    """Whether there is such a name; if not, a problem says what there is."""
    known = list(known)
    if name in known:
        return True
    if name is None:
        problems.append(f"{where} is missing: {_some(known)}")
    else:
        problems.append(f"{where}: {name!r} is no {what}; {_hint(name, known)}")
    return False


def _hint(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {_some(known)}"


def _some(names: Iterable[str]) -> str:
    return ", ".join(names)


def _listed(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(_is(x, kind) for x in value)


def _is(value: Any, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
