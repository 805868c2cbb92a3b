"""The codec lab: its candidates, its loop over recorded steps, its figures, a run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flash
from benchmarks.codec_lab import __main__ as command
from benchmarks.codec_lab import candidates, streams
from benchmarks.codec_lab.candidates import Exact, Library, Table
from benchmarks.codec_lab.evaluate import Lab, bytes_per_param
from benchmarks.codec_lab.measures import leaf_sums, pool
from benchmarks.codec_lab.report import front
from benchmarks.codec_lab.streams import Leaf, Streams
from benchmarks.codec_lab.tracking import Layout, by_leaf, track
from benchmarks.codec_lab.variants import Variant, variants

pytestmark = pytest.mark.full

SIGNED = {
    "linear": candidates.linear(4),
    "softsign": candidates.softsign(4),
    "power": candidates.signed_power(4, 1.5),
    "dynamic": candidates.dynamic(4, 3, signed=True),
}
UNSIGNED = {
    "power": candidates.power(4, 2, zero=False),
    "power and 0": candidates.power(4, 2, zero=True),
    "log": candidates.log(4, 12, zero=False),
    "log and 0": candidates.log(4, 12, zero=True),
    "floating": candidates.floating(4, 1),
    "dynamic": candidates.dynamic(4, 3, signed=False),
    "power, 8 bits": candidates.power(8, 2, zero=False),
    "floating, 8 bits": candidates.floating(8, 4),
}
BOOKS = [*SIGNED.items(), *UNSIGNED.items()]
IDS = [name for name, _ in BOOKS]


def table(book, **options):
    return Table(book=np.asarray(book, np.float32), **options)


def gradients(shape, seed=0, spread=1.0):
    """Normal, of scales that differ between elements."""
    rng = np.random.default_rng(seed)
    scale = np.exp(spread * rng.normal(size=shape[1:]))
    return (rng.normal(size=shape) * scale).astype(np.float32)


# Books


@pytest.mark.parametrize("book", [b for _, b in BOOKS], ids=IDS)
def test_books_are_sorted_and_end_at_one(book):
    assert book.size in (15, 16, 256)
    assert (np.diff(book) > 0).all()
    assert book[-1] == 1 and book[0] >= -1


def test_signed_books_by_their_formulas():
    k = np.arange(-7, 8)
    np.testing.assert_allclose(SIGNED["linear"], k / 7, rtol=1e-15)
    np.testing.assert_allclose(SIGNED["softsign"], k / (14 - abs(k)), rtol=1e-15)
    expected = np.sign(k) * abs(k / 7) ** 1.5
    np.testing.assert_allclose(SIGNED["power"], expected, rtol=1e-15)


def test_dynamic_map_as_published():
    published = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = sorted([-x for x in published] + [0.0] + published + [1.0])
    np.testing.assert_allclose(SIGNED["dynamic"], expected, rtol=1e-12)
    eight = candidates.dynamic(8, 7, signed=False)
    assert eight[0] == 0 and eight[1] == pytest.approx(3.25e-7)


def test_unsigned_books_by_their_formulas():
    k = np.arange(16)
    np.testing.assert_allclose(UNSIGNED["power"], ((k + 1) / 16) ** 2, rtol=1e-15)
    np.testing.assert_allclose(UNSIGNED["power and 0"], (k / 15) ** 2, rtol=1e-15)
    np.testing.assert_allclose(np.log2(UNSIGNED["log"]), 0.8 * (k - 15), atol=1e-12)
    assert UNSIGNED["log and 0"][0] == 0 and UNSIGNED["log and 0"][1] == 2.0**-12


@pytest.mark.parametrize("bits, mantissa", [(4, 0), (4, 1), (8, 4), (8, 5)])
def test_floats_are_neighbouring_floats(bits, mantissa):
    book = candidates.floating(bits, mantissa)
    fraction, _ = np.frexp(book)
    codes = fraction * 2 ** (mantissa + 1)
    np.testing.assert_array_equal(codes, np.round(codes))
    # As many for each octave as the mantissa has values: none is left out.
    octaves, counts = np.unique(np.floor(np.log2(book)), return_counts=True)
    assert octaves[-1] == 0 and counts[-1] == 1
    assert (counts[1:-1] == 2**mantissa).all()


# Quantizing


@pytest.mark.parametrize("book", [b for _, b in BOOKS], ids=IDS)
@pytest.mark.parametrize("scale", ["bf16", "fp16", "fp32", "power of two"])
def test_nearest_against_all_values(book, scale):
    x = gradients((3, 2, 32), seed=1)[0]
    x = x if book[0] < 0 else x**2
    codec = table(book, scale=scale, root=1 if book[0] < 0 else 2)
    stored = np.asarray(codec.quantize(jnp.asarray(x), None), np.float64)
    largest = np.abs(x).max(-1, keepdims=True).astype(np.float64)
    # What the largest magnitude became tells the scale, as the book holds 1.
    scales = np.asarray(codec._scales(jnp.abs(jnp.asarray(x))), np.float64)
    slack = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 2**-22, "power of two": 1}[scale]
    assert (scales >= largest * (1 - 1e-5)).all()
    assert (scales <= largest * (1 + slack) ** codec.root * (1 + 1e-5)).all()
    values = scales[..., None] * book
    distances = np.abs(values - x[..., None])
    np.testing.assert_allclose(
        np.abs(stored - x), distances.min(-1), rtol=1e-4, atol=2e-6 * scales.max()
    )


@pytest.mark.parametrize("book", [b for _, b in BOOKS], ids=IDS)
def test_stochastic_is_unbiased(book):
    draws, group = 4000, 32
    x = gradients((1, group), seed=2)[0]
    x = x if book[0] < 0 else x**2
    codec = table(book, guard=bool(book[0] == 0))
    many = jnp.broadcast_to(jnp.asarray(x), (draws, group))
    bits = jax.random.bits(jax.random.key(0), many.shape, jnp.uint32)
    stored = np.asarray(codec.quantize(many, bits), np.float64)
    scale = float(codec._scales(jnp.abs(jnp.asarray(x)))[0])
    smallest = scale * (book[0] if book[0] > 0 else book[1])
    # Below the smallest positive code and above or below all codes there is no choice.
    low = scale * book[0] if book[0] < 0 else smallest
    expected = np.clip(x, low, scale).astype(np.float64)
    deviation = stored.std(axis=0) / math.sqrt(draws)
    assert (np.abs(stored.mean(axis=0) - expected) < 5 * deviation + 1e-6 * scale).all()
    # Both neighbours are taken, and nothing else.
    assert all(len(np.unique(column)) <= 2 for column in stored.T)
    assert deviation.max() > 0


def test_guard_keeps_positive_values_positive():
    x = jnp.array([[1.0, 1e-6, 0.0]])
    book = UNSIGNED["power and 0"]
    assert table(book).quantize(x, None)[0, 1] == 0
    guarded = table(book, guard=True).quantize(x, None)
    np.testing.assert_allclose(guarded, [[1.0, 1 / 225, 0.0]], rtol=1e-6)


def test_group_of_zeros_is_zero():
    for _, book in BOOKS:
        for scale in candidates.SCALE_BYTES:
            stored = table(book, scale=scale).quantize(jnp.zeros((2, 32)), None)
            np.testing.assert_array_equal(stored, 0)


@pytest.mark.parametrize(
    "book, root",
    [
        (UNSIGNED["floating"], 1),
        (UNSIGNED["log"], 0.8),
        (UNSIGNED["floating, 8 bits"], 1),
    ],
    ids=["floats", "log", "8 bits"],
)
def test_lattice_stays_when_the_scale_moves(book, root):
    """What is stored stays exact when a group's largest element shrinks."""
    codec = table(book, scale="power of two", root=root)
    x = jnp.asarray(1 + np.random.default_rng(3).random((8, 32), np.float32))
    stored = codec.quantize(x, None)
    shrunk = stored.at[:, 0].set(1e-3 * stored[:, 1])
    again = codec.quantize(shrunk, None)
    np.testing.assert_allclose(again[:, 1:], stored[:, 1:], rtol=1e-5)


def test_rank_1_scales():
    book = np.array([0.0, 1.0])
    codec = table(book, scale="fp32", group=None)
    x = np.abs(gradients((1, 3, 4, 5), seed=4)[0])
    axes = [x.max((1, 2), keepdims=True), x.max((0, 2), keepdims=True)]
    axes.append(x.max((0, 1), keepdims=True))
    expected = np.minimum(np.minimum(*axes[:2]), axes[2])
    np.testing.assert_array_equal(codec._scales(jnp.asarray(x)), expected)
    assert codec._scales(jnp.asarray(x[0, 0])) == x[0, 0].max()
    # One bit for each of 60 elements, in rows of a byte, and 12 scales.
    assert codec.nbytes((3, 4, 5)) == 12 + 4 * 12


@pytest.mark.parametrize("signed", [True, False])
def test_library_codecs_and_tables_of_their_curves_agree(signed):
    x = jnp.asarray(gradients((4, 3, 100), seed=5)[0])
    x = x if signed else jnp.square(x)
    curves = dict(signed_curve="softsign", unsigned_curve="float")
    ours = Library(optax_flash.Companded4(signed=signed, **curves))
    if signed:
        twin = table(SIGNED["softsign"])
    else:
        twin = table(UNSIGNED["floating"], scale="power of two")
    layout = Layout([x.shape], 32)
    packed = layout.unpack(twin.quantize(layout.pack(np.asarray(x).reshape(-1)), None))
    difference = packed.reshape(x.shape) - np.asarray(ours.quantize(x, None))
    assert np.linalg.norm(difference) < 1e-4 * np.linalg.norm(x)
    # Four scales a row: the library's in bfloat16, the lab's powers of two in a byte.
    assert ours.nbytes((4, 100)) == 4 * (50 + 2 * 4)
    assert twin.nbytes((4, 100)) == 4 * (50 + (2 if signed else 1) * 4)


def test_bytes():
    codec = table(SIGNED["linear"])
    # 33 codes of 4 bits take 17 bytes and 2 scales 4.
    assert codec.nbytes((2, 33)) == 2 * (17 + 4)
    lattice = table(UNSIGNED["floating"], scale="power of two", group=64)
    assert bytes_per_param(Variant("v", "", 64, "nearest", 4, lattice)) == 0.5 + 1 / 64


# Tracking


def test_float32_tracking_is_the_average():
    grads = gradients((12, 2, 32))
    start = gradients((1, 2, 32), seed=6)[0] ** 2
    tracked = track(
        Exact(),
        start,
        grads,
        jnp.float32(0.95),
        square=True,
        rounding="nearest",
        checkpoints=3,
    )
    average, checkpoints = start.astype(np.float64), []
    for i, grad in enumerate(grads.astype(np.float64)):
        average = 0.95 * average + 0.05 * grad**2
        if i % 4 == 3:
            checkpoints.append(average)
    np.testing.assert_allclose(tracked.exact, checkpoints, rtol=1e-5)
    np.testing.assert_array_equal(tracked.stored, tracked.exact[-1])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "unsticking"])
def test_tracking_against_a_plain_loop(rounding):
    grads, start = gradients((8, 16, 32)), gradients((1, 16, 32), seed=7)[0]
    codec = table(SIGNED["softsign"])
    settings = dict(square=False, rounding=rounding, checkpoints=2)
    tracked = track(codec, start, grads, jnp.float32(0.9), **settings)

    def store(x, old, step):
        hashing = optax_flash.codecs.hashing
        bits = hashing.bits(hashing.fold(step, hashing.salt("m")), x.shape)
        arguments = {
            "nearest": [None],
            "stochastic": [bits],
            "unsticking": [bits, jnp.asarray(old)],
        }[rounding]
        return np.asarray(codec.quantize(jnp.asarray(x), *arguments))

    stored = store(start, start, 0)
    for i, grad in enumerate(grads):
        exact = np.float32(0.9) * stored + np.float32(0.1) * grad
        stored = store(exact, stored, i + 1)
        if i % 4 == 3:
            # A last bit may decide about a code, if rarely.
            far = np.abs(tracked.exact[i // 4] - exact) > 1e-5 * np.abs(exact).max()
            assert far.mean() < 0.02
    assert (np.abs(tracked.stored - stored) > 1e-5).mean() < 0.02


def test_nearest_freezes_and_stochastic_follows():
    """The failure that the lab is to show: a slow average of smaller squares."""
    grads = np.full((2000, 1, 32), 0.5, np.float32)
    grads[..., 0] = 1.0  # keeps the group's scale
    start = jnp.ones((1, 32))
    codec = table(UNSIGNED["power"], root=2)
    means = {}
    for rounding in ("nearest", "stochastic", "unsticking"):
        settings = dict(square=True, rounding=rounding, checkpoints=1)
        tracked = track(codec, start, grads, jnp.float32(0.999), **settings)
        means[rounding] = float(tracked.stored[0, 1:].mean())
    truth = 0.25 + 0.75 * 0.999**2000
    assert means["nearest"] == 1.0
    assert means["stochastic"] == pytest.approx(truth, rel=0.2)
    # Nearest would never move, so this is the very same.
    assert means["unsticking"] == means["stochastic"]


def test_unsticking_draws_only_where_nearest_stays():
    codec = table(SIGNED["linear"], scale="fp32")
    stored = jnp.array([[1.0, 3 / 7, 3 / 7]])
    x = jnp.broadcast_to(jnp.array([[1.0, 2.7 / 7, 2.3 / 7]]), (4000, 3))
    bits = jax.random.bits(jax.random.key(1), x.shape, jnp.uint32)
    rounded = np.asarray(codec.quantize(x, bits, stored))
    # The first stays; the second would, and draws; the third moves to the nearest.
    np.testing.assert_allclose(rounded[:, 0], 1.0)
    assert rounded[:, 1].mean() == pytest.approx(2.7 / 7, abs=5 * 0.46 / 7 / 63)
    np.testing.assert_allclose(rounded[:, 2], 2 / 7, rtol=1e-6)


def test_groups_never_cross_rows():
    shapes = [(2, 40), (3, 3, 2, 10), (5,)]
    count = sum(math.prod(shape) for shape in shapes)
    flat = np.arange(1, 2 * count + 1, dtype=np.float32).reshape(2, count)
    layout = Layout(shapes, 32)
    packed = layout.pack(flat)
    assert packed.shape == (2, 2 * 2 + 18 + 1, 32)
    np.testing.assert_array_equal(layout.unpack(packed), flat)
    np.testing.assert_array_equal(packed[0, 1], [*range(33, 41), *[0] * 24])
    np.testing.assert_array_equal(packed[0, 4, :10], range(81, 91))
    assert (packed[0, 4, 10:] == 0).all()


def test_by_leaf_gives_each_leaf_its_shape():
    shapes = [(2, 3), (4,)]
    flat = np.arange(20.0).reshape(2, 10)
    seen = []

    def double(x):
        seen.append(x.shape)
        return {"twice": 2 * x}

    np.testing.assert_array_equal(by_leaf(double, shapes, flat)["twice"], 2 * flat)
    assert seen == [(2, 2, 3), (2, 4)]


# Figures

LEAVES = (
    Leaf("embed", "embedding", (64, 64), (64, 64)),
    Leaf("block_0/up", "mlp", (96, 80), (96, 80)),
    Leaf("block_0/norm", "norm", (64,), (64,)),
    Leaf("conv", "convolution", (3, 3, 32, 32), (20, 32)),
)
SIZES = tuple(math.prod(leaf.recorded) for leaf in LEAVES)
COUNT = sum(SIZES)


def synthetic(name, steps=16):
    zeros = np.zeros(COUNT, np.float32)
    m = dict.fromkeys((streams.B1, streams.LION_B2), zeros)
    grads = gradients((steps, COUNT), seed=len(name))
    return Streams(name, LEAVES, grads, m, dict.fromkeys(streams.B2S, zeros), 0)


@pytest.mark.parametrize("b2", streams.B2S)
def test_reference_is_optax(b2):
    recorded = synthetic("x")
    lab = Lab(recorded)
    tx = optax.scale_by_adam(streams.B1, b2, 1e-8)
    state = tx.init(jnp.zeros(COUNT))
    for i, grad in enumerate(recorded.grads):
        expected, state = tx.update(grad, state)
        if i == 3:
            first = expected
    ours = lab.update(b2)
    np.testing.assert_allclose(ours[0], first, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours[-1], expected, rtol=1e-4, atol=1e-6)


def test_lion_is_optax():
    recorded = synthetic("x")
    lab = Lab(recorded)
    tx = optax.scale_by_lion(streams.LION_B1, streams.LION_B2)
    state = tx.init(jnp.zeros(COUNT))
    for grad in recorded.grads:
        expected, state = tx.update(grad, state)
    ours = lab.lion(lab.reference("m", streams.LION_B2).exact)[-1]
    # Sums that are zero but for their last bits have either sign.
    assert (ours == expected).mean() > 0.9999


def test_figures_against_numpy():
    x, r = gradients((2, COUNT), seed=8), gradients((2, COUNT), seed=9)
    pooled = pool(leaf_sums(x, r, SIZES), LEAVES)
    assert set(pooled) == {"all", "embedding", "mlp", "norm", "convolution"}
    first, second = 64 * 64, 64 * 64 + 96 * 80
    parts = {
        "embedding": slice(0, first),
        "mlp": slice(first, second),
        "norm": slice(second, second + 64),
    }
    for kind, part in parts.items():
        a, b = x[:, part].astype(np.float64), r[:, part].astype(np.float64)
        got = pooled[kind]
        assert got.error == pytest.approx(
            np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-4
        )
        assert got.nmse == pytest.approx(got.error**2, rel=1e-4)
        cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert got.cosine == got.worst_cosine == pytest.approx(cosine, abs=1e-4)
        ratio = np.linalg.norm(a) / np.linalg.norm(b)
        assert got.rms_ratio == pytest.approx(ratio, rel=1e-4)
        assert got.largest == np.float32(np.abs(a).max())
    # "all" is without the norm: it is too small to be compressed.
    both = np.delete(np.stack([x, r]).astype(np.float64), np.r_[parts["norm"]], axis=-1)
    a, b = both
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert pooled["all"].error == pytest.approx(error, rel=1e-4)


def test_better_codes_have_smaller_figures():
    lab = Lab(synthetic("x"))
    errors = []
    for codec in (Exact(), table(candidates.softsign(8)), table(SIGNED["softsign"])):
        run = lab.run(Variant("m", "", 32, "nearest", 0, codec), streams.B1)
        update = lab.update(0.999, m=run.exact)
        sums = leaf_sums(update, lab.update(0.999), SIZES)
        errors.append(pool(sums, LEAVES)["all"].error)
    assert errors[0] == 0
    # 16 times as many codes; less is gained where 4 bits already round to zero.
    assert 0 < 5 * errors[1] < errors[2] < 1


# Streams


class Regression:
    """A workload of two leaves, without data on disk."""

    name = "regression"

    def init(self, seed):
        key = jax.random.key(seed)
        return {"w": jax.random.normal(key, (8, 6)), "norm": {"scale": jnp.ones(6)}}

    def batch(self, seed, step):
        return np.random.default_rng((seed, step)).normal(size=(4, 8)).astype("f")

    def loss(self, params, x):
        return jnp.mean((x @ params["w"] * params["norm"]["scale"] - 1) ** 2)

    def kind(self, path):
        return "norm" if path.startswith("norm") else "mlp"


def test_recorded_averages_are_those_of_the_steps_before():
    whole = streams.record(Regression(), steps=12, window=12, max_size=1000)
    late = streams.record(Regression(), steps=12, window=4, max_size=1000)
    assert whole.step == 0 and late.step == 8
    assert [leaf.path for leaf in late.leaves] == ["norm/scale", "w"]
    np.testing.assert_array_equal(late.grads, whole.grads[8:])
    earlier = whole.grads[:8].astype(np.float64)
    for powers, averages in (1, late.m), (2, late.v):
        for decay, recorded in averages.items():
            average = 0.0
            for grad in earlier:
                average = decay * average + (1 - decay) * grad**powers
            np.testing.assert_allclose(recorded, average, rtol=1e-4, atol=1e-6)
    assert set(late.m) == {0.9, 0.99} and set(late.v) == {0.999, 0.95}
    # Clipped as a whole.
    assert np.linalg.norm(whole.grads, axis=-1).max() < 1 + 1e-5


def test_rows_of_large_leaves():
    whole = streams.record(Regression(), steps=2, window=2, max_size=1000)
    part = streams.record(Regression(), steps=2, window=2, max_size=20)
    assert part.leaves[1] == Leaf("w", "mlp", (8, 6), (3, 6))
    rows = whole.grads[:, 6:].reshape(2, 8, 6)[:, [0, 3, 7]]
    np.testing.assert_array_equal(part.grads[:, 6:], rows.reshape(2, 18))


def test_one_leaf_of_every_kind_and_shape():
    shapes = {f"block_{i}/{k}": (8, 8) for i in range(3) for k in ("qkv", "up")}
    shapes["norm"] = (8,)
    leaves = streams.choose(shapes, lambda path: path.split("/")[-1], 64)
    assert [leaf.path for leaf in leaves] == ["block_0/qkv", "block_2/up", "norm"]


def test_workloads_side_by_side():
    gpt, image = synthetic("gpt"), synthetic("image")
    both = streams.join([gpt, image])
    assert [leaf.path for leaf in both.leaves[3:5]] == ["gpt/conv", "image/embed"]
    np.testing.assert_array_equal(both.grads[:, COUNT:], image.grads)
    assert all(x.shape == (2 * COUNT,) for x in [*both.m.values(), *both.v.values()])
    with pytest.raises(ValueError, match="gpt: 16 after 0, image: 8 after 0"):
        streams.join([gpt, synthetic("image", steps=8)])


# Variants and a run


def test_variants_are_distinct():
    every = variants()
    keys = [(v.field, v.bits, v.name, v.origin) for v in every]
    assert len(set(keys)) == len(keys)
    assert {v.field for v in every if v.family == "companded8"} == {"m", "v"}
    for v in every:
        book = getattr(v.codec, "book", None)
        if book is not None:
            assert (book[0] < 0) == (v.field == "m")


def test_run_writes_everything(tmp_path, monkeypatch, capsys):
    for name in ("gpt", "image"):
        streams.save(synthetic(name), tmp_path / "data" / f"{name}.npz")
    few = [
        v
        for v in variants()
        if v.origin != "lab" or v.name == "softsign, 32, stochastic"
        if v.group in (32, "rank-1") and v.family != "affine8"
    ]
    monkeypatch.setattr(command, "variants", lambda: few)
    out = tmp_path / "out"
    command.main(["--data", str(tmp_path / "data"), "--out", str(out)])
    result = json.loads((out / "codec_lab.json").read_text())
    assert len(result["fields"]) == len(few) * len(streams.B2S)
    for entry in result["fields"]:
        assert 0.5 < entry["bytes"] < 1.2
        for name in ("one_shot_nmse", "tracked_nmse", "tracked_mean", "update_error"):
            assert set(entry[name]) == {"all", *(leaf.kind for leaf in LEAVES)}
            assert entry[name]["all"] > 0
    flips = [
        entry["lion_flips"]["all"]
        for entry in result["fields"]
        if "lion_flips" in entry
    ]
    assert len(flips) == sum(v.field == "m" for v in few)
    assert all(0 < share < 0.5 for share in flips)
    formats = {(p["m"]["family"], p["v"]["family"]) for p in result["pairs"]}
    assert ("companded8", "companded8") in formats
    assert ("flashoptim", "flashoptim") in formats
    page = (out / "codec_lab.md").read_text()
    assert "companded8, 32, stochastic **(ours)**" in page
    assert "flashoptim, 32, nearest *(published)*" in page
    assert (out / "codec_lab.png").read_bytes().startswith(b"\x89PNG")
    assert f"{len(few)}/{len(few)}" in capsys.readouterr().out


def test_front_has_no_pair_that_another_beats():
    class Pair:
        def __init__(self, size, error):
            self.bytes = size
            self.update = {"all": type("Measured", (), {"error": error})}

    pairs = [Pair(2, 0.1), Pair(1, 0.3), Pair(1, 0.2), Pair(3, 0.2), Pair(3, 0.05)]
    line = [(p.bytes, p.update["all"].error) for p in front(pairs)]
    assert line == [(1, 0.2), (2, 0.1), (3, 0.05)]
