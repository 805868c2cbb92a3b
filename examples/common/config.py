"""The options of a trainer: fields of a dataclass, from a TOML file and a command line.

    python -m examples.lm.train --config examples/lm/config.toml --steps 200

A file gives defaults, the command line goes before it. Both name fields of the
trainer's `Config`.
"""

import argparse
import dataclasses
import difflib
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from examples.common.optimizers import check_name


def option(default, help, **kwargs):
    """A field of a Config that is also an option of the command line."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def bits_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What all trainers have in common; each adds its model and its data."""

    optimizer: str = option(
        "adamw8",
        "ours or optax's by name, with options and codecs if any: lion8, "
        '"lowrank_adamw(rank=8)", adamw@companded4',
    )
    learning_rate: float | None = option(
        None, "the schedule's peak; the optimizer's own default if left out", type=float
    )
    weight_decay: float = option(0.1, "for the optimizers that have it; matrices only")
    clip: float = option(1.0, "the gradients' largest global norm; 0 for no clipping")
    warmup: int = option(50, "steps of linear warmup, before the cosine decay")
    steps: int = option(500, "planned steps: the schedule ends here")
    batch_size: int = option(8, "examples a step")
    param_dtype: str = option(
        "bfloat16",
        "how weights are stored; norms stay float32",
        choices=["float32", "bfloat16"],
    )
    master_bits: int | None = option(
        24,
        "bits of a bfloat16 weight together with its residual: 24, 32, or none for no "
        "residual",
        type=bits_or_none,
        choices=[24, 32, None],
        metavar="{24,32,none}",
    )
    residual: str = option(
        "exact", "the residual's codec", choices=["exact", "flashoptim"]
    )
    compute_dtype: str = option(
        "float32", "what the model computes in", choices=["float32", "bfloat16"]
    )
    seed: int = option(0, "of the first weights and of the order of the data")
    eval_every: int = option(100, "steps between two validations")
    eval_batches: int = option(16, "held-out batches, always the same ones")
    report_every: int = option(
        100, "steps between two looks at codes and at the size of steps; 0 for none"
    )
    out: str | None = option(
        None,
        "folder for checkpoints, metrics, plots and summary.json; nothing is written "
        "if left out",
        type=str,
    )
    save_every: int = option(100, "steps between two checkpoints")
    resume: bool = option(
        False, "go on from the newest checkpoint in --out; repeat all other options"
    )
    stop_at: int | None = option(
        None, "stop early, after this step, as if interrupted", type=int
    )
    data_dir: str = option("data", "where datasets are looked for and prepared, once")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(
                    f"{field.name} is {value!r}; it can be {_listed(choices)}"
                )
        for name in ("steps", "batch_size", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"warmup is {self.warmup} of {self.steps} steps; give fewer, or 0"
            )
        if self.resume and self.out is None:
            raise ValueError("resume needs the out folder of the run to go on with")
        check_name(self.optimizer)


C = TypeVar("C", bound=Config)


def from_mapping(cls: type[C], options: Mapping[str, Any], where: str) -> C:
    """A Config of these options.

    Args:
      cls: a trainer's Config.
      options: some fields, by name.
      where: they come from, for errors.

    Raises:
      ValueError: a name that is no field, or a value that a field does not take.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in options.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"there are {_listed(fields)}"
            )
            raise ValueError(f"{where}: {name!r} is no option; {hint}")
        if not _fits(value, fields[name]):
            raise ValueError(
                f"{where}: {name} is {value!r}, a {type(value).__name__}; "
                f"it should be {_kind(fields[name])}"
            )
    options = {
        # TOML has no None: "none" stands for it.
        name: None if value == "none" and fields[name].default != "none" else value
        for name, value in options.items()
    }
    try:
        return cls(**options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_toml(path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is malformed, with the line.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def parse(cls: type[C], doc: str | None, args: Sequence[str] | None = None) -> C:
    """The command line: one option for each field, and --config for a file of them."""
    parser = argparse.ArgumentParser(
        description=(doc or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="a TOML file of options", metavar="FILE")
    for field in dataclasses.fields(cls):
        kwargs = dict(field.metadata)
        kwargs["help"] += f" ({field.default})"
        if isinstance(field.default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs.setdefault("type", type(field.default))
        parser.add_argument("--" + field.name.replace("_", "-"), **kwargs)
    given = vars(parser.parse_args(args))
    file = given.pop("config", None)
    try:
        options = {} if file is None else read_toml(file)
        if file is not None:
            from_mapping(cls, options, file)  # its mistakes are the file's
        return from_mapping(cls, options | given, "options")
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _fits(value: Any, field: dataclasses.Field) -> bool:
    default, kind = field.default, field.metadata.get("type")
    if default is None or kind is bits_or_none:
        if value is None or value == "none":
            return True
        kind = int if kind is bits_or_none else kind
    else:
        kind = type(default)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _kind(field: dataclasses.Field) -> str:
    kind = field.metadata.get("type")
    if kind is bits_or_none:
        return '24, 32 or "none"'
    return f"like {field.default!r}" if field.default is not None else kind.__name__


def _listed(names) -> str:
    return ", ".join(map(str, names))
