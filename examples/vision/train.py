"""Trains a classifier of small pictures with any optimizer, in any storage of weights.

    python -m examples.vision.train --config examples/vision/config.toml
    python -m examples.vision.train --model vit --optimizer lion8 --out runs/lion8

Options are the fields of Config. Every number a run produces follows from them; an
interrupted run that resumes repeats the uninterrupted one bit for bit.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console

import examples.common.config
import optax_flash
from examples.common.config import option, parse
from examples.common.loop import Result, Watch, fit
from examples.common.optimizers import check_name
from examples.common.states import full_weights
from examples.vision.data import DATASETS, MIRRORED, SHIFT, Splits, batches, prepare
from examples.vision.models import ResNet, ViT
from examples.vision.state import State, create_state

WIDTHS = {"resnet": 32, "vit": 96}
VIT_RATES = {"lion": 5e-4, "sgd": 0.1}
"""Where a small ViT takes another default learning rate than other small models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(examples.common.config.Config):
    batch_size: int = option(32, "pictures a step")
    steps: int = option(400, "planned steps: the schedule ends here")
    eval_batches: int = option(64, "held-out batches, always the same ones")
    model: str = option("resnet", "what is trained", choices=["resnet", "vit"])
    dataset: str = option("fashion_mnist", "what is shown", choices=list(DATASETS))
    augment: bool = option(True, "shift pictures, and mirror those of clothes")
    width: int | None = option(
        None,
        f"features, of a resnet's first stage: {WIDTHS} if left out",
        type=int,
    )
    blocks: str = option("1,1,1", "resnet: residual blocks in each stage")
    bottleneck: bool = option(False, "resnet: blocks of three convolutions")
    stem_stride: int = option(2, "resnet: of the first convolution")
    depth: int = option(3, "vit: layers")
    heads: int = option(3, "vit: attention heads")
    patch: int = option(7, "vit: pixels along a side of a patch")

    def __post_init__(self):
        super().__post_init__()
        stages = self.blocks.split(",")
        if not all(count.strip().isdigit() and int(count) > 0 for count in stages):
            raise ValueError(
                f"blocks is {self.blocks!r}; give a number a stage, such as 2,2,2,2"
            )
        width = self.features
        if width % 32:
            raise ValueError(f"width is {width}; give a multiple of 32")
        if self.model == "vit" and width % self.heads:
            raise ValueError(f"width {width} does not split into {self.heads} heads")

    @property
    def features(self) -> int:
        return WIDTHS[self.model] if self.width is None else self.width


def make_model(config: Config, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """The model of these options, for pictures of size x size pixels."""
    dtype = jnp.dtype(config.compute_dtype)
    if config.model == "resnet":
        return ResNet(
            config.features,
            tuple(int(count) for count in config.blocks.split(",")),
            bottleneck=config.bottleneck,
            stem_stride=config.stem_stride,
            dtype=dtype,
            rngs=rngs,
        )
    if size % config.patch:
        raise ValueError(
            f"patches of {config.patch} x {config.patch} pixels do not tile a picture "
            f"of {size} x {size}; choose a patch that divides {size}"
        )
    return ViT(
        size,
        config.patch,
        width=config.features,
        depth=config.depth,
        heads=config.heads,
        dtype=dtype,
        rngs=rngs,
    )


def init_state(config: Config, size: int = 28) -> State:
    """The state before the first step."""
    if config.model == "vit" and config.learning_rate is None:
        base = check_name(config.optimizer).base
        rates = (rate for name, rate in VIT_RATES.items() if base.startswith(name))
        config = dataclasses.replace(config, learning_rate=next(rates, None))
    rngs = nnx.Rngs(jax.random.key(config.seed))
    return create_state(config, make_model(config, size, rngs))


def loss_and_accuracy(model, batch) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy in nats, and the share of pictures that are named rightly."""
    logits, labels = model(batch["image"]), batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (jnp.argmax(logits, -1) == labels).mean()


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state: State, batch):
    """One update in place: the old state's memory becomes the new state's."""
    grad = nnx.value_and_grad(loss_and_accuracy, has_aux=True)
    (loss, accuracy), grads = grad(state.model, batch)
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "grad_norm": optax.tree.norm(nnx.as_pure(grads)),
    }
    state.optimizer.update(state.model, grads)
    return state, metrics


@jax.jit
def eval_step(state: State, batch):
    nnx.update(state.model, full_weights(state))
    return loss_and_accuracy(state.model, batch)


@jax.jit
def report_step(state: State, batch):
    """How the state is stored, and what another step on this batch would be."""
    grads = nnx.grad(loss_and_accuracy, has_aux=True)(state.model, batch)[0]
    return optax_flash.numerics_report(
        state.tx, state.opt_state, state.params, nnx.as_pure(grads)
    )


def evaluate(state: State, held_out: Sequence) -> dict[str, float]:
    """Loss and accuracy over held-out batches, with the full weights."""
    found = [eval_step(state, batch) for batch in held_out]
    loss, accuracy = (sum(map(float, x)) / len(x) for x in zip(*found, strict=True))
    return {"val_loss": loss, "val_accuracy": accuracy}


def held_out_batches(gallery, config: Config) -> list:
    """The same held-out pictures for every run, whatever its seed."""
    count = min(config.eval_batches, max(1, len(gallery) // config.batch_size))
    shuffled = batches(gallery, config.batch_size, seed=0)
    return [shuffled[i] for i in range(count)]


def train(
    config: Config,
    data: Splits | None = None,
    *,
    console: Console | None = None,
    watch: Watch | None = None,
) -> Result:
    """Trains as the options say.

    Args:
      config: the options.
      data: square pictures of ten classes, in the place of those that the options name.
      console: where progress is shown.
      watch: sees every row of the history; returns a reason to stop, or None.
    """
    data = DATASETS[config.dataset](config.data_dir) if data is None else data
    galleries = prepare(config.data_dir, data)
    held_out = held_out_batches(galleries["validation"], config)
    return fit(
        config,
        init_state(config, size=data["train"].images.shape[-1]),
        batches(
            galleries["train"],
            config.batch_size,
            config.seed,
            shift=SHIFT if config.augment else 0,
            mirror=config.augment and config.dataset in MIRRORED,
        ),
        step=train_step,
        evaluate=functools.partial(evaluate, held_out=held_out),
        report=report_step,
        units="images",
        units_per_step=config.batch_size,
        console=console,
        watch=watch,
    )


def main():
    console = Console()
    result = train(parse(Config, __doc__), console=console)
    console.print_json(data={k: v for k, v in result.summary.items() if k != "config"})


if __name__ == "__main__":
    main()
