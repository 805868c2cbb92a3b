"""The codec lab: which codes lose least of m, v and the update, per byte.

    make codec-lab

Trains the GPT and the image model of benchmarks/workloads.py with float32 AdamW,
records the gradients of some leaves of every kind (data/codec_lab, used again until
--record), and runs every codec, rounding, scale and group of variants.py over them.
Writes codec_lab.json to runs/codec_lab, codec_lab.md and .png to benchmarks/results.
"""

import argparse
import pathlib
import sys
import time

from benchmarks import workloads
from benchmarks.summaries import RESULTS, ROOT, RUNS

from .evaluate import Lab
from .report import choose_pairs, write
from .streams import join, load, record, save
from .variants import variants


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "data/codec_lab")
    parser.add_argument("--out", type=pathlib.Path, help="folder of everything")
    parser.add_argument("--record", action="store_true", help="train and record again")
    parser.add_argument("--steps", type=int, default=1200, help="of training")
    parser.add_argument("--window", type=int, default=800, help="steps recorded")
    parser.add_argument(
        "--max-size", type=int, default=8_192, help="elements kept of a leaf"
    )
    parser.add_argument("--only", default="", help="variants whose names contain this")
    args = parser.parse_args(arguments)
    paths = []
    for name, make in {"gpt": workloads.gpt, "image": workloads.image}.items():
        path = args.data / f"{name}.npz"
        if args.record or not path.exists():
            start = time.time()
            recorded = record(
                make(),
                steps=args.steps,
                window=args.window,
                max_size=args.max_size,
            )
            save(recorded, path)
            print(f"{name}: recorded in {time.time() - start:.0f} s", flush=True)
        paths.append(path)
    streams = join([load(path) for path in paths])
    lab = Lab(streams)
    fields = []
    chosen = [v for v in variants() if args.only in v.name]
    for i, variant in enumerate(sorted(chosen, key=lambda v: str(v.group))):
        start = time.time()
        fields += lab.field(variant)
        error = " ".join(f"{r.update['all'].error:.3f}" for r in fields[-2:])
        took = f"{time.time() - start:.1f} s"
        print(f"{i + 1}/{len(chosen)} {variant.field} {variant.bits} bits", end=" ")
        print(f"{variant.name}: {error} {took}", flush=True)
    pairs = list(lab.pairs(choose_pairs(fields)))
    print(f"{len(pairs)} pairs", flush=True)
    raw, shown = args.out or RUNS / "codec_lab", args.out or RESULTS
    write(raw, shown, streams, fields, pairs, " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
