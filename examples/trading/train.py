"""Trains a trading agent with any optimizer, in any storage of its weights.

    python -m examples.trading.train --config examples/trading/config.toml
    python -m examples.trading.train --optimizer lion8 --out runs/lion8

This is a check that the storage of an optimizer does not change an agent. It is NOT
advice: the stocks are those that survived, and nothing here can be expected to earn.

Options are the fields of Config. Every number a run produces follows from them; an
interrupted run that resumes repeats the uninterrupted one bit for bit.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import examples.common.config
import optax_flash
from examples.common.config import option, parse
from examples.common.loop import Result, Watch, fit
from examples.common.states import create_state, full_weights
from examples.trading import backtest
from examples.trading.data import Market, Prices, Years, after, batches, prepare
from examples.trading.environment import TradingEnv, rewards
from examples.trading.model import Agent, AgentConfig
from examples.trading.report import DISCLAIMER, draw_wealth, table

CHUNK = 64  # observations that the agent sees at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(examples.common.config.Config):
    steps: int = option(300, "planned steps: the schedule ends here")
    warmup: int = option(30, "steps of linear warmup, before the cosine decay")
    batch_size: int = option(8, "windows a step")
    context: int = option(32, "days in an observation, and in a window of training")
    bins: int = option(32, "tokens a stock: quantiles of its returns; 256 at most")
    depth: int = option(2, "layers")
    width: int = option(128, "features; a multiple of 32 * heads")
    heads: int = option(4, "attention heads")
    dropout: float = option(0.8, "share of bars that are hidden in training")
    cost: float = option(0.0005, "of a trade, as a fraction of what is traded")
    risk_aversion: float = option(
        5.0, "how much variance counts against growth; 1 is the log's own"
    )
    entropy: float = option(1.0, "weight of the portfolio's entropy: stay spread out")
    token_weight: float = option(1.0, "of the next tokens' loss")
    block: int = option(20, "days, the mean length of the bootstrap's blocks")
    first_year: int = option(1998, "of training")
    validation_year: int = option(2013, "the first one; training ends before it")
    test_year: int = option(2016, "the first one; validation ends before it")

    def __post_init__(self):
        super().__post_init__()
        if not self.first_year < self.validation_year < self.test_year:
            raise ValueError(
                f"training from {self.first_year}, validation from "
                f"{self.validation_year}, test from {self.test_year}: give later years "
                "for later ones"
            )
        if not 2 <= self.bins <= 256:
            raise ValueError(f"bins is {self.bins}; tokens are bytes: give 2 to 256")
        if not 0 <= self.cost < 0.5:
            raise ValueError(f"cost is {self.cost}; give a fraction from 0 to 0.5")

    @property
    def years(self) -> Years:
        return Years(self.first_year, self.validation_year, self.test_year)


def init_state(config: Config, stocks: int):
    """The state before the first step."""
    model = Agent(
        AgentConfig(
            stocks=stocks,
            bins=config.bins,
            depth=config.depth,
            width=config.width,
            heads=config.heads,
            dropout=config.dropout,
            compute_dtype=jnp.dtype(config.compute_dtype),
        )
    )

    @jax.jit  # one program, and so every leaf has a buffer of its own to donate
    def create(key):
        tokens = jnp.zeros((1, config.context, stocks), jnp.uint8)
        return create_state(config, model.apply, model.init(key, tokens)["params"])

    return create(jax.random.key(config.seed))


def utility(weights, returns, config: Config):
    """A year's growth after costs, less the price of its variance."""
    gains, _ = rewards(weights, returns, config.cost)
    # Growth has half of the variance in it already: that is an aversion of 1.
    penalty = (config.risk_aversion - 1) / 2 * jnp.square(gains)
    return backtest.DAYS * jnp.mean(gains - penalty)


def loss_fn(params, apply_fn, batch, config: Config, key=None):
    """Nats a token, less utility, less entropy; each window is an episode from cash.

    Utility is that above equal weights: this changes no gradient and takes the market's
    own ups and downs out of the loss. Entropy is what the portfolio lacks of equal
    weights of stocks and cash. With a key, bars are dropped.
    """
    logits, portfolio = apply_fn(
        {"params": params},
        batch["tokens"][:, :-1],
        training=key is not None,
        rngs=None if key is None else {"dropout": key},
    )
    targets = batch["tokens"][:, 1:].astype(jnp.int32)
    tokens = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    weights, returns = jnp.exp(portfolio), batch["returns"]
    equal = jnp.full_like(returns, 1 / returns.shape[-1])
    gain = utility(weights[..., :-1], returns, config) - utility(equal, returns, config)
    lack = math.log(weights.shape[-1]) + jnp.sum(weights * portfolio, axis=-1).mean()

    loss = config.token_weight * tokens - gain + config.entropy * lack
    return loss, {"token_loss": tokens, "utility": gain}


def make_steps(config: Config):
    """The jitted steps of training, of validation and of the report of numerics."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        return value_and_grad(state.params, state.apply_fn, batch, config, key)

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state, batch):
        """One update in place: the old state's memory becomes the new state's."""
        (loss, parts), grads = gradients(state, batch)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **parts}
        return state.apply_gradients(grads=grads), metrics

    @jax.jit
    def eval_step(state, batch):
        loss, parts = loss_fn(full_weights(state), state.apply_fn, batch, config)
        return {"loss": loss, **parts}

    @jax.jit
    def report_step(state, batch):
        """How the state is stored, and what another step on this batch would be."""
        _, grads = gradients(state, batch)
        return optax_flash.numerics_report(
            state.tx, state.opt_state, state.params, grads
        )

    return train_step, eval_step, report_step


@jax.jit
def act(state, observations):
    """Weights for observations, (count, context, stocks) -> (count, stocks)."""
    _, portfolio = state.apply_fn({"params": full_weights(state)}, observations)
    return jnp.exp(portfolio[:, -1, :-1])


def act_in_order(state, market: Market, context: int) -> np.ndarray:
    """The agent's weights on each day of a market that has a next one.

    What it sees does not depend on what it does, so that many days go at once.
    """
    windows = np.lib.stride_tricks.sliding_window_view(market.tokens, context, axis=0)
    windows = np.moveaxis(windows[:-1], -1, 1)  # (days, context, stocks)
    filled = np.zeros((-len(windows) % CHUNK, *windows.shape[1:]), windows.dtype)
    chunks = np.split(
        np.concatenate([windows, filled]), range(CHUNK, len(windows), CHUNK)
    )
    return np.concatenate([act(state, chunk) for chunk in chunks])[: len(windows)]


def episodes_of(state, market: Market, config: Config) -> dict[str, backtest.Episode]:
    """The agent and the baselines in the environment, until the market ends."""
    env = TradingEnv(market, context=config.context, bins=config.bins, cost=config.cost)
    weights = iter(act_in_order(state, market, config.context))
    policies = {"agent": lambda observation, info: next(weights)}
    policies |= {name: make() for name, make in backtest.BASELINES.items()}
    return {name: backtest.rollout(env, policy) for name, policy in policies.items()}


def train(
    config: Config,
    prices: Prices | None = None,
    *,
    console: Console | None = None,
    watch: Watch | None = None,
) -> Result:
    """Trains as the options say, on 20 American stocks unless other prices are given.

    Args:
      config: the options.
      prices: daily closes.
      console: where progress is shown.
      watch: sees every row of the history; returns a reason to stop, or None.
    """
    context = config.context
    market = prepare(config.years, config.bins, config.data_dir, prices)
    # On its first day an agent sees the last days of the years before.
    validation = after(market["train"], market["validation"], context - 1)
    testing = after(market["validation"], market["test"], context - 1)
    stocks = market["train"].tokens.shape[1]
    train_step, eval_step, report_step = make_steps(config)
    held_out = batches(market["validation"], context, config.batch_size, seed=0)
    held_out = [held_out[i] for i in range(config.eval_batches)]

    def evaluate(state) -> dict[str, float]:
        found = jax.device_get([eval_step(state, batch) for batch in held_out])
        means = {f"val_{k}": float(np.mean([x[k] for x in found])) for k in found[0]}
        weights = act_in_order(state, validation, context)
        gains, turnover = rewards(weights, validation.returns[context:], config.cost)
        return means | {
            "val_sharpe": float(backtest.sharpe(np.asarray(gains))),
            "val_annual_return": float(backtest.annual_return(np.asarray(gains))),
            "val_turnover": float(backtest.DAYS * turnover.mean()),
        }

    def test(state) -> dict[str, Any]:
        episodes = episodes_of(state, testing, config)
        if config.out:
            draw_wealth(
                episodes,
                pathlib.Path(config.out) / "wealth.png",
                title=f"Test years, after costs: agent trained with {config.optimizer}",
            )
        return backtest.compare(episodes.pop("agent"), episodes, block=config.block)

    return fit(
        config,
        init_state(config, stocks),
        batches(market["train"], context, config.batch_size, config.seed),
        step=train_step,
        evaluate=evaluate,
        test=test,
        report=report_step,
        units="bars",
        units_per_step=config.batch_size * context * stocks,
        unit_of_loss="nats a token, less utility a year",
        console=console,
        watch=watch,
    )


def main():
    console = Console()
    result = train(parse(Config, __doc__), console=console)
    if result.summary["metrics"]:
        console.print(table(result.summary["metrics"]))
    console.print(DISCLAIMER, style="bold")
    numbers = {
        k: v for k, v in result.summary.items() if k not in ("config", "metrics")
    }
    console.print_json(data=numbers)


if __name__ == "__main__":
    main()
