"""``python -m optax_flash.plan``: what fits, from the command line."""

import argparse
import json
import pathlib
import sys

from optax_flash.plan import chart, configs, devices, models, optimizers
from optax_flash.plan.planner import FLOAT32, plan
from optax_flash.plan.result import Plan

BITS = {"auto": "auto", "24": 24, "32": 32, "none": None}
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str] | None = None) -> None:
    """Prints a plan, and draws it.

    Args:
      arguments: None for those of the command line.
    """
    args = _parser().parse_args(arguments)
    try:
        ours = _plan(
            args, args.optimizer, BITS[args.bits], args.param_dtype, args.release
        )
        print(ours)
        if args.chart:
            stock = _plan(args, "adamw", None, "float32", False)
            bars = {FLOAT32.replace(", ", "\n"): stock, args.optimizer: ours}
            chart.save(bars, args.chart)
            print(f"The chart is in {args.chart}.")
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


def _plan(
    args: argparse.Namespace,
    optimizer: str,
    bits: int | str | None,
    param_dtype: str | None,
    release: bool,
) -> Plan:
    return plan(
        _model(args),
        optimizer,
        args.device,
        args.mesh,
        bits=bits,
        param_dtype=param_dtype,
        batch=args.batch or _devices(args),
        length=args.length,
        remat=args.remat,
        release=release,
        loss_chunks=args.loss_chunks,
        memory_fraction=args.memory_fraction,
    )


def _model(args: argparse.Namespace) -> models.Model:
    if not args.model.endswith(".json"):
        return models.preset(args.model)
    path = pathlib.Path(args.model)
    return configs.from_config(json.loads(path.read_text()), path.parent.name)


def _devices(args: argparse.Namespace) -> int:
    count = 1
    for size in (args.mesh or {}).values():
        count *= size
    return count


def _mesh(text: str) -> dict[str, int]:
    try:
        pairs = [item.split("=") for item in text.split(",")]
        return {name: int(size) for name, size in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not like fsdp=8 or data=2,fsdp=4"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optax_flash.plan",
        description="Bytes that a training step takes on each device.",
    )
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(models.PRESETS)}, or a config.json")
    known = ", ".join(optimizers.OURS | optimizers.OPTAX)
    add("--optimizer", default="adamw8", help=known)
    add("--device", default="h100-80gb", help=", ".join(devices.DEVICES))
    add("--mesh", type=_mesh, help="such as fsdp=8 or data=2,fsdp=4; one device if not")
    add(
        "--bits",
        choices=BITS,
        default="auto",
        help="of the weights; auto is 24 for our optimizers and none for others",
    )
    add("--param-dtype", choices=DTYPES)
    add("--batch", type=int, help="examples on all devices; one on each if not given")
    add("--length", type=int, help="tokens of an example; the model's own if not given")
    add("--remat", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--release", action="store_true", help="free each gradient in the backward pass"
    )
    add("--loss-chunks", type=int, default=1, help="pieces in which logits are made")
    add(
        "--memory-fraction",
        type=float,
        help="of the device; JAX's default if not given",
    )
    add("--chart", metavar="FILE.png", help="draw stacked bars (needs matplotlib)")
    return parser


if __name__ == "__main__":
    main()
