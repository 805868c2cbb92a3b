"""Does a fused implementation compute what plain JAX computes, on this device?

A GPU's division, square root and fused multiply-add may differ from XLA's in the last
bit, and where a number lies on the edge between two codes the code differs then. So
codes need not be equal, but a difference is one code, and rare.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flash

PyTree = Any

LEARNING_RATE = 1e-3
REFERENCE = "xla"
GROUP = 32

SHAPES: Mapping[str, tuple[int, ...]] = {
    "matrix": (1024, 1024),
    "embedding": (5003, 192),
    "ragged": (300, 1000),
    "stack": (4, 128, 256),
    "vector": (40_003,),
    "bias": (768,),
}
DRY_SHAPES: Mapping[str, tuple[int, ...]] = {
    "matrix": (64, 64),
    "ragged": (50, 100),
    "vector": (5000,),
    "bias": (24,),
}

LIMITS = {
    # The edge of a code is hit by chance: float32 has 2**16 numbers to a code and more.
    "codes_differing": 1e-4,
    "largest_code_difference": 1,
    # A scale is a maximum rounded up to bfloat16. Where the maximum is such a number,
    # a last bit makes the next one of it; gradients in bfloat16 bring that about.
    "scales_differing": 0.01,
    "largest_scale_difference": 1,
    "largest_code_difference_beside_other_scale": 2,
    # See compare_weights.
    "weights_off": 1e-4,
    "largest_weight_error": 1.0,
    # Both run on by themselves: RMS of their difference over RMS of the distance gone.
    "drift": 0.02,
    "not_finite": 0,
}
"""The most that each figure of a check may be."""

SHARES = ("codes_differing", "scales_differing", "weights_off")


def transformation(case: str, implementation: str) -> optax.GradientTransformation:
    adamw = functools.partial(
        optax_flash.adamw8, LEARNING_RATE, weight_decay=0.1, codecs=codec_of(case)
    )
    if case == "float32 params":
        return adamw(implementation=implementation)
    return optax_flash.master_weights(
        adamw(), finished="finished" in case, implementation=implementation
    )


def codec_of(case: str) -> optax_flash.Codec:
    """The codec of both moments."""
    return optax_flash.get_codec("companded4" if "4 bits" in case else "companded8")


CASES = (
    "float32 params",
    "bfloat16 params, additive",
    "bfloat16 params, finished",
    "bfloat16 params, finished, 4 bits",
)


def check(
    implementation: str, case: str, shapes: Mapping[str, tuple[int, ...]], steps: int
) -> dict[str, Any]:
    """Takes steps with an implementation and with the reference, and compares.

    Each step begins from the reference's params and state, so that a difference is that
    of one step; and once more the implementation goes all the way by itself.

    Returns:
      The figures of LIMITS, and ``"passed"``.
    """
    dtype = jnp.float32 if case == "float32 params" else jnp.bfloat16
    step = stepper(transformation(case, implementation))
    init, reference_step = reference(case)
    params = sample(shapes, dtype, seed=0, spread=0.0)
    state = init(params)
    start = weights(params, state)
    alone = (params, state)
    figures: dict[str, list[float]] = {name: [] for name in LIMITS}
    for i in range(steps):
        grads = sample(shapes, dtype, seed=1 + i, spread=2.0)
        got = step(params, state, grads)
        alone = step(*alone, grads)
        old = weights(params, state)
        params, state = reference_step(params, state, grads)
        step_figures = {
            **compare_codes(got[1], state, codec_of(case)),
            **compare_weights(weights(*got), weights(params, state), old),
        }
        for name, value in step_figures.items():
            figures[name].append(value)
    gone = distance(weights(params, state), start)
    figures["drift"] = [distance(weights(*alone), weights(params, state)) / gone]
    # Shares are means over the steps, the others the worst of them.
    summary = {
        name: float(np.mean(values) if name in SHARES else np.max(values))
        for name, values in figures.items()
    }
    passed = all(value <= LIMITS[name] for name, value in summary.items())
    return {**summary, "passed": passed}


@functools.cache
def reference(case: str) -> tuple[Any, Any]:
    """The reference's init and step, compiled once for all implementations."""
    tx = transformation(case, REFERENCE)
    return tx.init, stepper(tx)


def stepper(tx: optax.GradientTransformation) -> Any:
    @jax.jit
    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def sample(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, seed: int, spread: float
) -> dict[str, jax.Array]:
    """Normal numbers, whose sizes are lognormal where there is a spread."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        x = rng.standard_normal(shape, np.float32)
        size = np.exp(spread * rng.standard_normal(shape, np.float32))
        return jnp.asarray(0.02 * x * size, dtype)

    return {name: draw(shape) for name, shape in shapes.items()}


def weights(params: PyTree, state: PyTree) -> dict[str, np.ndarray]:
    if isinstance(state, optax_flash.MasterWeightsState):
        params = optax_flash.master_params(state, params)
    return {name: np.asarray(x, np.float32) for name, x in params.items()}


def distance(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> float:
    """RMS over all elements."""
    squares = [np.square(x[name].astype(np.float64) - y[name]) for name in x]
    return float(np.sqrt(np.mean(np.concatenate([s.ravel() for s in squares]))))


def compare_weights(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], old: dict[str, np.ndarray]
) -> dict[str, float]:
    """How many weights are off, and the largest error as a part of what is allowed.

    Off is a weight by more than one of its 24 bits, as stochastic rounding may go the
    other way, and a thousandth of the learning rate. The largest error may be a step of
    bfloat16: additive updates miss by half of one where a weight shrinks by more than
    half, and may do so on either side.
    """
    errors, beyond = [], []
    for name, wanted in want.items():
        error = np.abs(got[name] - wanted)
        size = np.maximum(np.abs(wanted), np.abs(old[name]))
        least = 1e-3 * LEARNING_RATE
        beyond.append(np.ravel(error > 2.0**-15 * size + least))
        errors.append(np.max(error / (2.0**-7 * size + least)))
    return {
        "weights_off": np.mean(np.concatenate(beyond)),
        "largest_weight_error": np.max(errors),
        "not_finite": sum(np.count_nonzero(~np.isfinite(x)) for x in got.values()),
    }


def compare_codes(got: PyTree, want: PyTree, codec: Any) -> dict[str, float]:
    """How the codes and scales of two states of AdamW differ."""
    same, rescaled, scales = [], [], []
    for field in ("mu", "nu"):
        got_codes, want_codes = (optax.tree.get(x, field) for x in (got, want))
        got_scales, want_scales = (
            optax.tree.get(x, "scales")[f"{field}_scales"] for x in (got, want)
        )
        for name, wanted in want_codes.items():
            if wanted.dtype != np.uint8:
                continue  # too small a leaf for codes; its weights are compared
            scale_steps = difference(
                *(np.asarray(x[name]).view(np.int16) for x in (got_scales, want_scales))
            )
            code_steps = difference(
                *(places(codec, field, x) for x in (got_codes[name], wanted))
            )
            equal = np.repeat(scale_steps == 0, GROUP, axis=-1)
            equal = equal[..., : code_steps.shape[-1]]
            same.append(np.where(equal, code_steps, 0).ravel())
            if field == "mu":
                rescaled.append(np.where(equal, 0, code_steps).ravel())
            else:
                # The next power of two is 2**7 bfloat16 on, and all codes are others.
                scale_steps = scale_steps / 2**7
            scales.append(scale_steps.ravel())
    code, scale = np.concatenate(same), np.concatenate(scales)
    return {
        "codes_differing": np.mean(code > 0),
        "largest_code_difference": np.max(code),
        "scales_differing": np.mean(scale > 0),
        "largest_scale_difference": np.max(scale),
        "largest_code_difference_beside_other_scale": np.max(np.concatenate(rescaled)),
    }


def places(codec: Any, field: str, codes: jax.Array) -> np.ndarray:
    """Codes as integers in the order of what they stand for."""
    codes = np.asarray(codec.unpack(jnp.asarray(codes))).astype(np.int16)
    if field == "nu":
        return codes
    sign = 1 << (codec.bits - 1)
    return np.where(codes & sign, -(codes & (sign - 1)), codes)


def difference(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """How many steps apart two arrays of integers are."""
    a, b = (x.astype(np.int32) for x in (got, want))
    # What rounds to zero but for its last bit may take the first code of either sign.
    about_zero = (a == -b) & (np.abs(a) == 1)
    return np.where(about_zero, 1, np.abs(a - b))
