"""Trains a language model on bytes with any optimizer, in any storage of its weights.

    python -m examples.lm.train --config examples/lm/config.toml
    python -m examples.lm.train --optimizer lion8 --steps 1000 --out runs/lion8

Options are the fields of Config. Every number a run produces follows from them; an
interrupted run that resumes repeats the uninterrupted one bit for bit.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import examples.common.config
import optax_flash
from examples.common.config import option, parse
from examples.common.loop import Result, Watch, fit
from examples.common.states import create_state, full_weights
from examples.lm.data import batches, prepare
from examples.lm.model import GPT, GPTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(examples.common.config.Config):
    seq_len: int = option(128, "bytes predicted in each window")
    depth: int = option(3, "layers")
    width: int = option(256, "features; a multiple of 32 * heads")
    heads: int = option(4, "attention heads")


def init_state(config: Config):
    """The state before the first step."""
    model = GPT(
        GPTConfig(
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            compute_dtype=jnp.dtype(config.compute_dtype),
        )
    )

    @jax.jit  # one program, and so every leaf has a buffer of its own to donate
    def create(key):
        tokens = jnp.zeros((1, config.seq_len), jnp.int32)
        return create_state(config, model.apply, model.init(key, tokens)["params"])

    return create(jax.random.key(config.seed))


def loss_fn(params, apply_fn, tokens):  # tokens: (B, T + 1) uint8 -> nats per byte
    logits = apply_fn({"params": params}, tokens[:, :-1])  # (B, T, 256)
    targets = tokens[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state, tokens):
    """One update in place: the old state's memory becomes the new state's."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, tokens)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state.apply_gradients(grads=grads), metrics


@jax.jit
def eval_step(state, tokens):
    return loss_fn(full_weights(state), state.apply_fn, tokens)


@jax.jit
def report_step(state, tokens):
    """How the state is stored, and what another step on these tokens would be."""
    grads = jax.grad(loss_fn)(state.params, state.apply_fn, tokens)
    return optax_flash.numerics_report(state.tx, state.opt_state, state.params, grads)


def held_out_batches(source, config: Config) -> list:
    """The same held-out windows for every run, whatever its seed."""
    count = min(config.eval_batches, math.ceil(len(source) / config.batch_size))
    shuffled = batches(source, config.batch_size, seed=0)
    return [shuffled[i] for i in range(count)]


def train(
    config: Config,
    texts: Mapping[str, bytes] | None = None,
    *,
    console: Console | None = None,
    watch: Watch | None = None,
) -> Result:
    """Trains as the options say, on Shakespeare unless other texts are given.

    Args:
      config: the options.
      texts: by name.
      console: where progress is shown.
      watch: sees every row of the history; returns a reason to stop, or None.
    """
    sources = prepare(config.seq_len, config.data_dir, texts)
    held_out = held_out_batches(sources["validation"], config)

    def evaluate(state) -> dict[str, float]:
        losses = [float(eval_step(state, tokens)) for tokens in held_out]
        loss = sum(losses) / len(losses)
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, 700)),  # of a byte
            "val_bits_per_byte": loss / math.log(2),
        }

    return fit(
        config,
        init_state(config),
        batches(sources["train"], config.batch_size, config.seed),
        step=train_step,
        evaluate=evaluate,
        report=report_step,
        units="tokens",
        units_per_step=config.batch_size * config.seq_len,
        unit_of_loss="nats per byte",
        console=console,
        watch=watch,
    )


def main():
    console = Console()
    result = train(parse(Config, __doc__), console=console)
    console.print_json(data={k: v for k, v in result.summary.items() if k != "config"})


if __name__ == "__main__":
    main()
