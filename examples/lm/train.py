"""Trains a language model on bytes with any optimizer, in any storage of its weights.

    python -m examples.lm.train --config examples/lm/config.toml
    python -m examples.lm.train --optimizer lion8 --steps 1000 --out runs/lion8

Options are the fields of Config. Every number a run produces follows from them; an
interrupted run that resumes repeats the uninterrupted one bit for bit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import examples.common.config
import optax_flash
from examples.common.config import option, parse
from examples.common.loop import Result, Watch, fit
from examples.common.states import create_state, full_weights
from examples.lm import decoders
from examples.lm.data import TEXTS, batches, prepare
from examples.lm.model import GPT, GPTConfig
from optax_flash import release


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(examples.common.config.Config):
    architecture: str = option(
        "gpt", "of the model: see the README", choices=["gpt", "gpt2", "llama"]
    )
    text: str = option("shakespeare", "what is read", choices=list(TEXTS))
    seq_len: int = option(128, "bytes predicted in each window")
    depth: int = option(3, "layers")
    width: int = option(256, "features; a multiple of 32 * heads")
    heads: int = option(4, "attention heads")
    vocab: int = option(256, "tokens of the embedding; bytes are the first 256")
    attention: str = option(
        "fused", "plain keeps all scores of a layer", choices=["plain", "fused"]
    )
    remat: bool = option(False, "layers are computed again in the backward pass")
    release: bool = option(
        False, "gradients are applied layer by layer, each clipped by itself"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.vocab < 256:
            raise ValueError(f"vocab is {self.vocab}; bytes need 256 or more")
        fixed = (self.attention, self.remat, self.release) == ("fused", False, False)
        if self.architecture == "gpt" and not fixed:
            raise ValueError(
                "architecture 'gpt' has fused attention, no remat and no release; "
                "choose 'gpt2' or 'llama' to change them"
            )


def model(config: Config) -> tuple[Callable, Callable]:
    """What makes the weights, key -> params, and the loss: (params, tokens) -> nats.

    tokens are (B, T + 1) uint8.
    """
    sizes = {
        "depth": config.depth,
        "width": config.width,
        "heads": config.heads,
        "vocab": config.vocab,
        "compute_dtype": jnp.dtype(config.compute_dtype),
    }
    if config.architecture == "gpt":
        gpt = GPT(GPTConfig(**sizes))

        def init(key):
            tokens = jnp.zeros((1, config.seq_len), jnp.int32)
            return gpt.init(key, tokens)["params"]

        def loss(params, tokens):
            logits = gpt.apply({"params": params}, tokens[:, :-1])  # (B, T, vocab)
            targets = tokens[:, 1:].astype(jnp.int32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean()

        return init, loss
    decoder_config = decoders.DecoderConfig(
        config.architecture,
        **sizes,
        seq_len=config.seq_len,
        attention=config.attention,
    )
    sequence = decoders.decoder(decoder_config)
    remat = config.remat or config.release
    loss = sequence if remat else decoders.without_remat(sequence)
    return functools.partial(decoders.init, decoder_config), loss


def init_state(config: Config):
    """The state before the first step; its apply_fn is the loss."""
    init, loss = model(config)
    if config.release:  # which clips each layer by itself
        config = dataclasses.replace(config, clip=0.0)

    @jax.jit  # one program, and so every leaf has a buffer of its own to donate
    def create(key):
        return create_state(config, loss, init(key))

    return create(jax.random.key(config.seed))


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state, tokens):
    """One update in place: the old state's memory becomes the new state's."""
    loss, grads = jax.value_and_grad(state.apply_fn)(state.params, tokens)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state.apply_gradients(grads=grads), metrics


def released_step(clip: float):
    """The same layer by layer, each clipped alone: no gradient outlives its layer."""
    per_layer = optax.clip_by_global_norm(clip) if clip else None

    @functools.partial(jax.jit, donate_argnames="state")
    def step(state, tokens):
        update = release.train_step(state.apply_fn, state.tx, per_layer=per_layer)
        loss, params, opt_state = update(state.params, state.opt_state, tokens)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {"loss": loss}

    return step


@jax.jit
def eval_step(state, tokens):
    return state.apply_fn(full_weights(state), tokens)


@jax.jit
def report_step(state, tokens):
    """How the state is stored, and what another step on these tokens would be."""
    grads = jax.grad(state.apply_fn)(state.params, tokens)
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
    """Trains as the options say.

    Args:
      config: the options.
      texts: by name, in the place of those that the options name.
      console: where progress is shown.
      watch: sees every row of the history; returns a reason to stop, or None.
    """
    texts = TEXTS[config.text](config.data_dir) if texts is None else texts
    sources = prepare(config.seq_len, config.data_dir, texts)
    step, report = train_step, report_step
    if config.release:  # a report would need all gradients at once
        step, report = released_step(config.clip), None
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
        step=step,
        evaluate=evaluate,
        report=report,
        units="tokens",
        units_per_step=config.batch_size * config.seq_len,
        unit_of_loss="nats per byte",
        released=config.release,
        console=console,
        watch=watch,
    )


def main():
    console = Console()
    result = train(parse(Config, __doc__), console=console)
    console.print_json(data={k: v for k, v in result.summary.items() if k != "config"})


if __name__ == "__main__":
    main()
