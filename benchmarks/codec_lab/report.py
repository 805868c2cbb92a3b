"""What the lab found, as JSON, as Markdown tables and as a Pareto plot."""

import json
import math
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from .evaluate import CHECKPOINTS, FieldResult, PairResult
from .measures import COMPRESSED_FROM, Measured
from .streams import B1, B2S, LION_B1, LION_B2, Streams
from .tracking import NEAREST, STOCHASTIC, UNSTICKING
from .variants import Variant

BEST = 3  # pairs measured for each number of bytes


def choose_pairs(
    fields: Sequence[FieldResult],
) -> list[tuple[Variant, Variant, float]]:
    """Pairs worth measuring, of all that there could be.

    Those of one library codec or one publication; and for each b2, sum of bytes and
    sizes of codes the few whose fields' errors add up to least, of any rounding and of
    stochastic rounding alone.
    """
    chosen: dict[tuple[Variant, Variant, float], None] = {}
    for b2 in B2S:
        ms, vs = (
            [r for r in fields if r.variant.field == field and r.b2 == b2]
            for field in "mv"
        )
        ranked: dict[Any, list[tuple[float, Variant, Variant]]] = {}
        for m in ms:
            for v in vs:
                if belong_together(m.variant, v.variant):
                    chosen[m.variant, v.variant, b2] = None
                error = math.hypot(m.update["all"].error, v.update["all"].error)
                entry = error, m.variant, v.variant
                size = m.variant.bits, v.variant.bits, round(m.bytes + v.bytes, 6)
                unbiased = m.variant.rounding == v.variant.rounding == STOCHASTIC
                for stochastic in {False, unbiased}:
                    ranked.setdefault((*size, stochastic), []).append(entry)
        for entries in ranked.values():
            for _, m, v in sorted(entries, key=lambda entry: entry[0])[:BEST]:
                chosen[m, v, b2] = None
    return list(chosen)


def belong_together(m: Variant, v: Variant) -> bool:
    """Whether they are one format, of the library or of a publication."""
    if m.origin == "lab" or m.origin != v.origin or m.rounding != v.rounding:
        return False
    if m.origin == "published" and m.bits == v.bits == 4:
        return True
    return (m.family, m.group) == (v.family, v.group)


def write(
    raw: pathlib.Path,
    shown: pathlib.Path,
    streams: Streams,
    fields: Sequence[FieldResult],
    pairs: Sequence[PairResult],
    command: str,
) -> None:
    """Writes codec_lab.json to one folder, codec_lab.md and .png to another."""
    for folder in (raw, shown):
        folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": "python -m benchmarks.codec_lab " + command,
        "machine": f"{platform.machine()} CPU, {jax.device_count()} device",
        "jax": jax.__version__,
        "workloads": streams.name,
        "steps_before": streams.step,
        "window": len(streams.grads),
        "b1": B1,
        "leaves": [leaf._asdict() for leaf in streams.leaves],
    }
    best = [r for b2 in B2S for r in worth_showing([p for p in pairs if p.b2 == b2])]
    # An entry a line.
    lists = {
        "fields": [json.dumps(_rounded(_field_entry(r))) for r in fields],
        "pairs": [json.dumps(_rounded(_pair_entry(r))) for r in best],
    }
    parts = [json.dumps(about, indent=1)[:-2]]
    for key, rows in lists.items():
        parts.append(f'"{key}": [\n' + ",\n".join(rows) + "\n]")
    (raw / "codec_lab.json").write_text(",\n".join(parts) + "\n}\n")
    (shown / "codec_lab.md").write_text(markdown(streams, fields, pairs, command))
    draw(pairs, shown / "codec_lab.png")


def _describe(variant: Variant) -> dict[str, Any]:
    names = ("family", "group", "rounding", "bits", "origin")
    return {name: getattr(variant, name) for name in names}


def _field_entry(result: FieldResult) -> dict[str, Any]:
    """By kind of leaf: NMSE, ratios of means and errors; the rest of all together."""
    entry = {
        "field": result.variant.field,
        **_describe(result.variant),
        "b2": result.b2,
        "bytes": result.bytes,
        "one_shot_nmse": {kind: x.nmse for kind, x in result.one_shot.items()},
        "tracked_nmse": {kind: x.nmse for kind, x in result.tracked.items()},
        "tracked_mean": {kind: x.mean_ratio for kind, x in result.tracked.items()},
        "lasting_error": {kind: x.error for kind, x in result.mean.items()},
        **_update_entry(result.update),
    }
    if result.lion:
        entry["lion_flips"] = {kind: flips(x) for kind, x in result.lion.items()}
    return entry


def _pair_entry(result: PairResult) -> dict[str, Any]:
    return {
        "m": _describe(result.m),
        "v": _describe(result.v),
        "b2": result.b2,
        "bytes": result.bytes,
        **_update_entry(result.update),
    }


def _update_entry(update: dict[str, Measured]) -> dict[str, Any]:
    names = ("cosine", "rms_ratio", "worst_cosine", "worst_leaf", "largest")
    return {
        "update_error": {kind: x.error for kind, x in update.items()},
        **{name: getattr(update["all"], name) for name in names},
    }


def flips(signs: Measured) -> float:
    """The share of signs that differ, from the cosine between them."""
    return (1 - signs.cosine) / 2


def _rounded(x: Any) -> Any:
    """Numbers to five digits."""
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


FIELD_TABLE = """\
The error of the update under stochastic rounding, by group; then at group 32, or at its
only group, under the others; then, stochastic if not said otherwise, by kind of leaf.
"""

INTRODUCTION = """\
# Codec lab

    python -m benchmarks.codec_lab{arguments}

Gradients of training the {workloads} workload in float32 with `optax.adamw`, steps
{first} to {last}, averaged again in codes: decode, average, encode at every step. The
update m_hat / (sqrt(v_hat) + eps) is that of the averages before they are encoded, as
the step uses it, and is compared with float32's at {checkpoints} steps of the window.
**Error** is the norm of their difference over the norm of float32's, over all leaves of
at least {minimum:,} elements. m has b1 = {b1}. Bytes are of codes and scales, in
matrices whose rows are whole groups.

"stochastic" is unbiased, "nearest" deterministic, "unsticking" nearest but where that
would leave a code as it was, stochastic there. NMSE and means are averages over leaves.
**Lasting error** is that of the average's mean over all steps of the window, in which
rounding that errs now up, now down cancels. **Lion's flips** are the share of signs of
its update that differ from float32's, with b1 = {lion[0]} and b2 = {lion[1]}.

The gradients are those of the float32 run: what an update's error does to later
gradients is not seen here. Of leaves above --max-size elements evenly spaced rows were
recorded, so rank-1 scales are of fewer rows than they would be. Leaves, kinds and what
else is not shown: `codec_lab.json`, which this command leaves in `runs/codec_lab`.
Formats: `benchmarks/codec_lab/variants.py`.
"""


def markdown(
    streams: Streams,
    fields: Sequence[FieldResult],
    pairs: Sequence[PairResult],
    command: str,
) -> str:
    """The page."""
    parts = [
        INTRODUCTION.format(
            arguments=f" {command}" if command else "",
            first=streams.step + 1,
            last=streams.step + len(streams.grads),
            workloads=streams.name.replace("+", " and the "),
            checkpoints=CHECKPOINTS,
            minimum=COMPRESSED_FROM,
            b1=B1,
            lion=(LION_B1, LION_B2),
        )
    ]
    for b2 in B2S:
        shown = worth_showing([pair for pair in pairs if pair.b2 == b2])
        parts += [f"## Both moments, b2 = {b2}\n", _pair_table(shown)]
        parts += ["Error by kind of leaf:\n", _kind_table(shown)]
    for field, b2 in [("v", b2) for b2 in B2S] + [("m", B2S[0])]:
        chosen = [r for r in fields if r.variant.field == field and r.b2 == b2]
        other = "m" if field == "v" else "v"
        for bits in (8, 4):
            heading = f"{field} of {bits} bits, {other} in float32"
            heading += f", b2 = {b2}" if field == "v" else f", b2 = {b2} for the update"
            parts += [f"## {heading}\n", FIELD_TABLE, _field_table(chosen, bits)]
    return "\n".join(parts)


def worth_showing(pairs: Sequence[PairResult]) -> list[PairResult]:
    """One format in groups of 32 or as published, and the best of their bytes."""
    known = [
        p
        for p in pairs
        if belong_together(p.m, p.v) and (p.m.group == 32 or p.m.origin == "published")
    ]
    unbiased = [p for p in pairs if p.m.rounding == p.v.rounding == STOCHASTIC]
    shown = {id(p): p for p in [*known, *front(pairs), *front(unbiased)]}
    return sorted(shown.values(), key=lambda p: (p.bytes, p.update["all"].error))


def front(pairs: Iterable[PairResult]) -> list[PairResult]:
    """Those that no other pair of fewer or as many bytes beats."""
    best: list[PairResult] = []
    for pair in sorted(pairs, key=lambda p: (p.bytes, p.update["all"].error)):
        if not best or pair.update["all"].error < best[-1].update["all"].error:
            best.append(pair)
    return best


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def _name(variant: Variant) -> str:
    mark = {"lab": "", "library": " **(ours)**", "published": " *(published)*"}
    return f"{variant.bits} bits, {variant.name}{mark[variant.origin]}"


def _pair_table(pairs: Sequence[PairResult]) -> str:
    header = ["m", "v", "bytes", "error", "cosine", "RMS ratio"]
    header += ["worst leaf's cosine", "largest update"]
    rows = []
    for pair in pairs:
        x = pair.update["all"]
        figures = [f"{pair.bytes:.3f}", f"{x.error:.4f}", f"{x.cosine:.5f}"]
        figures += [f"{x.rms_ratio:.4f}", f"{x.worst_cosine:.5f}", f"{x.largest:.3g}"]
        rows.append([_name(pair.m), _name(pair.v), *figures])
    return _table(header, rows)


def _kind_table(pairs: Sequence[PairResult]) -> str:
    kinds = [kind for kind in pairs[0].update if kind != "all"] if pairs else []
    rows = [
        [_name(p.m), _name(p.v), *(f"{p.update[kind].error:.4f}" for kind in kinds)]
        for p in pairs
    ]
    return _table(["m", "v", *kinds], rows)


def _field_table(fields: Sequence[FieldResult], bits: int) -> str:
    """A row for each codec; figures without a group are of 32, or of its only group."""
    families: dict[str, dict[tuple[int | str, str], FieldResult]] = {}
    for r in fields:
        if r.variant.bits == bits:
            family = families.setdefault(r.variant.family, {})
            family[r.variant.group, r.variant.rounding] = r
    every = {group for family in families.values() for group, _ in family}
    groups = sorted(every, key=lambda group: (isinstance(group, str), group))
    stuck = any(r.variant.rounding == UNSTICKING for r in fields)
    kinds = [kind for kind in fields[0].update if kind != "all"]
    header = ["codec", *map(str, groups), NEAREST, *([UNSTICKING] if stuck else [])]
    header += [*kinds, "RMS ratio", "tracked mean", f"{NEAREST}'s"]
    header += ["one-shot NMSE", "tracked NMSE", f"{NEAREST}'s", "lasting error"]
    header += ["Lion's flips"] if fields[0].lion else []
    rows = []
    for name, family in families.items():
        main = 32 if any(group == 32 for group, _ in family) else next(iter(family))[0]
        nearest = family.get((main, NEAREST))
        base = family.get((main, STOCHASTIC)) or nearest
        assert base is not None
        ours = base.variant.origin == "library"
        row = [f"{name} **(ours)**" if ours else name]
        row += [_error(family.get((group, STOCHASTIC))) for group in groups]
        row += [_error(nearest)]
        row += [_error(family.get((main, UNSTICKING)))] if stuck else []
        row += [f"{base.update[kind].error:.3f}" for kind in kinds]
        row += [f"{base.update['all'].rms_ratio:.3f}"]
        row += [_tracked(r, "mean_ratio", ".3f") for r in (base, nearest)]
        row += [f"{base.one_shot['all'].nmse:.1e}"]
        row += [_tracked(r, "nmse", ".1e") for r in (base, nearest)]
        row += [f"{base.mean['all'].error:.3f}"]
        row += [f"{flips(base.lion['all']):.2%}"] if base.lion else []
        rows.append((base.update["all"].error, row))
    return _table(header, [row for _, row in sorted(rows)])


def _error(result: FieldResult | None) -> str:
    return "" if result is None else f"{result.update['all'].error:.4f}"


def _tracked(result: FieldResult | None, name: str, form: str) -> str:
    return "" if result is None else format(getattr(result.tracked["all"], name), form)


COLOURS = {STOCHASTIC: "tab:blue", NEAREST: "tab:red", "mixed": "tab:grey"}
MARKERS = {"lab": "o", "library": "D", "published": "*"}


def draw(pairs: Sequence[PairResult], path: pathlib.Path) -> None:
    """The error of the update against bytes per parameter."""
    figure, axes = plt.subplots(1, len(B2S), figsize=(12, 5), sharey=True)
    for axis, b2 in zip(axes, B2S, strict=True):
        chosen = [pair for pair in pairs if pair.b2 == b2]
        for pair in chosen:
            both = {pair.m.rounding, pair.v.rounding}
            rounding = both.pop() if len(both) == 1 else "mixed"
            origins = {pair.m.origin, pair.v.origin}
            origin = origins.pop() if len(origins) == 1 else "lab"
            axis.scatter(
                pair.bytes,
                pair.update["all"].error,
                color=COLOURS[rounding],
                marker=MARKERS[origin],
                s={"lab": 12, "library": 40, "published": 120}[origin],
                zorder=1 + (origin != "lab"),
            )
        unbiased = [p for p in chosen if p.m.rounding == p.v.rounding == STOCHASTIC]
        line = front(unbiased)
        axis.plot(
            [pair.bytes for pair in line],
            [pair.update["all"].error for pair in line],
            color=COLOURS[STOCHASTIC],
            linewidth=0.8,
            drawstyle="steps-post",
        )
        axis.set(title=f"b2 = {b2}", yscale="log", xlabel="bytes a parameter, m and v")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("error of the update")
    for name, colour in COLOURS.items():
        axes[0].scatter([], [], color=colour, marker="s", label=name)
    for name, marker in MARKERS.items():
        axes[0].scatter([], [], color="black", marker=marker, label=name)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
