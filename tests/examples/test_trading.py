"""The trading example: no look-ahead, costs, figures, intervals, and an agent."""

import dataclasses
import functools
import importlib.metadata
import json
import shutil

import gymnasium
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import strategies
from rich.console import Console

from examples.common.config import parse, read_toml
from examples.trading import backtest, data, report, train
from examples.trading.data import Market, Prices, Years
from examples.trading.environment import TradingEnv, rewards

pytestmark = pytest.mark.usefixtures("quick_compile")

STOCKS, CONTEXT, BINS = 4, 4, 8


def momentum_market(seed: int = 0, edge: float = 0.01) -> Prices:
    """The best stock of a day does well the day after, by `edge`; else noise."""
    rng = np.random.default_rng(seed)
    dates = np.arange("2001-01-01", "2007-01-01", dtype="datetime64[D]")
    dates = dates[np.is_busday(dates)]
    returns = rng.normal(0, 0.005, (len(dates), STOCKS))
    for day in range(1, len(dates)):
        returns[day, returns[day - 1].argmax()] += edge
        returns[day] -= returns[day].mean()
    returns += rng.normal(0, 0.01, (len(dates), 1))  # of the market
    closes = 10 * np.exp(np.cumsum(returns, axis=0))
    return Prices(dates, tuple("ABCD"), closes)


PRICES, YEARS = momentum_market(), Years(2001, 2005, 2006)


@pytest.fixture(scope="session", name="data_dir")
def data_dir_fixture(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(name="config")
def config_fixture(data_dir):
    return train.Config(
        context=CONTEXT,
        bins=BINS,
        depth=1,
        width=32,
        heads=1,
        dropout=0.0,
        entropy=0.0,
        risk_aversion=1.0,
        first_year=YEARS.first,
        validation_year=YEARS.validation,
        test_year=YEARS.test,
        batch_size=32,
        steps=60,
        warmup=5,
        eval_every=30,
        eval_batches=4,
        report_every=0,
        learning_rate=0.01,
        data_dir=data_dir,
    )


@pytest.fixture(scope="session", name="markets")
def markets_fixture(data_dir):
    return data.prepare(YEARS, BINS, data_dir, PRICES)


def environment(market: Market, cost: float = 0.001) -> TradingEnv:
    return TradingEnv(market, context=CONTEXT, bins=BINS, cost=cost)


# --- data


def test_splits_are_years_in_order(markets):
    returns = PRICES.closes[1:] / PRICES.closes[:-1] - 1
    dates = [market.dates for market in markets.values()]
    np.testing.assert_array_equal(np.concatenate(dates), PRICES.dates[1:])
    for market, first, last in zip(
        markets.values(), (2001, 2005, 2006), (2004, 2005, 2006), strict=True
    ):
        assert str(market.dates[0]).startswith(str(first))
        assert str(market.dates[-1]).startswith(str(last))
    found = np.concatenate([market.returns for market in markets.values()])
    np.testing.assert_allclose(found, returns, rtol=1e-6)
    in_a_bin = np.bincount(markets["train"].tokens[:, 0], minlength=BINS)
    assert in_a_bin.max() - in_a_bin.min() <= 1


def test_bins_know_the_training_years_alone():
    days = 40
    returns = np.random.default_rng(0).normal(size=(days, 2))
    training = np.arange(days) < 30
    tokens = data.tokenise(returns, training, 5)
    later = returns.copy()
    later[30:] *= 100
    np.testing.assert_array_equal(data.tokenise(later, training, 5)[:30], tokens[:30])
    assert set(data.tokenise(later, training, 5)[30:].ravel()) <= {0, 2, 4}


def test_windows_are_days_and_what_they_earn(markets):
    market = markets["train"]
    found = data.batches(market, CONTEXT, 8, seed=1)
    batch = found[3]
    assert batch["tokens"].shape == (8, CONTEXT + 1, STOCKS)
    rows = {row.tobytes(): day for day, row in enumerate(market.returns)}
    for tokens, returns in zip(batch["tokens"], batch["returns"], strict=True):
        day = rows[returns[0].tobytes()]  # the day after the first one
        np.testing.assert_array_equal(tokens, market.tokens[day - 1 : day + CONTEXT])
        np.testing.assert_array_equal(returns, market.returns[day : day + CONTEXT])
    again = data.batches(market, CONTEXT, 8, seed=1)[3]
    np.testing.assert_array_equal(again["tokens"], batch["tokens"])
    other = data.batches(market, CONTEXT, 8, seed=2)[3]
    assert not np.array_equal(other["returns"], batch["returns"])


def test_sp500_is_read_without_its_package():
    prices = data.sp500()
    assert prices.closes.shape == (8313, 20)
    assert prices.names[0] == "AAPL" and prices.closes[0, 0] == 0.264
    assert [str(day) for day in prices.dates[[0, -1]]] == ["1990-01-02", "2022-12-28"]


def test_missing_package_says_what_to_run(monkeypatch, config):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(ModuleNotFoundError, match="--no-deps skfolio==1.12.2"):
        train.train(config)


def test_wrong_prices_are_named(tmp_path):
    def prepare(**changes):
        data.prepare(YEARS, BINS, tmp_path, PRICES._replace(**changes))

    closes = PRICES.closes.copy()
    closes[5, 2] = np.nan
    with pytest.raises(ValueError, match=f"close of C on {PRICES.dates[5]} is nan"):
        prepare(closes=closes)
    with pytest.raises(ValueError, match="the day after"):
        prepare(dates=PRICES.dates[::-1])
    with pytest.raises(ValueError, match="ask for"):
        prepare(names=("A",))
    with pytest.raises(ValueError, match="no day of 2001.*test years"):
        data.prepare(Years(2001, 2005, 2010), BINS, tmp_path, PRICES)


# --- environment


def test_environment_is_one_of_gymnasium(markets):
    env = environment(markets["test"])
    check_env(env, skip_render_check=True)
    assert isinstance(env.unwrapped, gymnasium.Env)


def test_costs_by_hand():
    day = np.datetime64("2020-01-01") + np.arange(4)
    returns = np.array([[0, 0], [0.1, 0.0], [0.0, -0.5], [0.0, 0.2]], np.float32)
    market = Market(day, returns, np.zeros_like(returns, np.uint8))
    env = TradingEnv(market, context=1, bins=2, cost=0.01)
    _, info = env.reset()
    assert info["wealth"] == 1 and not info["held"].any()

    # From cash into half and half: 1 is traded. Stock 0 then gains 10 %.
    _, reward, _, _, info = env.step([0.5, 0.5])
    assert np.exp(reward) == pytest.approx(0.99 * 1.05)
    assert info["turnover"] == pytest.approx(1.0)
    assert info["held"] == pytest.approx([0.55 / 1.05, 0.5 / 1.05])

    # All into cash: what is held is sold, and a fall costs nothing.
    sold = 1.0
    _, reward, _, _, info = env.step([0.0, 0.0])
    assert np.exp(reward) == pytest.approx(1 - 0.01 * sold)

    # Weights of 3 and 1 are scaled down to 1.
    _, reward, terminated, truncated, info = env.step([3.0, 1.0])
    assert np.exp(reward) == pytest.approx(0.99 * 1.05)
    assert truncated and not terminated
    assert info["wealth"] == pytest.approx(0.99 * 1.05 * 0.99 * 0.99 * 1.05)


def test_wrong_actions_are_refused(markets):
    env = environment(markets["test"])
    env.reset()
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(STOCKS, np.nan))
    with pytest.raises(ValueError, match="-0.5.*not negative"):
        env.step([-0.5, 0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"\(3,\); weights are \(4,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="too few"):
        environment(Market(*(x[:CONTEXT] for x in markets["test"])))
    backtest.rollout(env, backtest.equal_weight_daily)
    with pytest.raises(ValueError, match="call reset"):
        env.step(np.zeros(STOCKS))


@pytest.mark.full
def test_twin_gives_the_rewards_of_the_environment(markets):
    market = markets["test"]
    rng = np.random.default_rng(0)
    days = len(market.dates) - CONTEXT
    logits = 3 * rng.normal(size=(days, STOCKS + 1))
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    weights = weights[:, :-1].astype(np.float32)
    actions = iter(weights)
    episode = backtest.rollout(
        environment(market, cost=0.02), lambda observation, info: next(actions)
    )
    twin = jax.jit(rewards)(weights, market.returns[CONTEXT:], 0.02)
    np.testing.assert_allclose(twin[0], episode.rewards, atol=1e-6)
    np.testing.assert_allclose(twin[1], episode.turnovers, atol=1e-6)
    assert next(actions, None) is None and episode.turnovers.mean() > 0.5


@pytest.fixture(name="state")
def state_fixture(config):
    """A state whose portfolio depends on what it sees, as the first one's does not."""
    return perturbed(dataclasses.replace(config, param_dtype="float32"))


@functools.cache
def perturbed(config):
    state, noise = train.init_state(config, STOCKS), np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + jnp.asarray(noise.normal(0, 0.3, p.shape), p.dtype), state.params
    )
    return state.replace(params=params)


@pytest.mark.full
def test_the_future_changes_nothing_before_it(state, markets, data_dir):
    at = 60  # of the test days; prices change after its close
    last = np.flatnonzero(PRICES.dates == markets["test"].dates[at])[0]
    closes = PRICES.closes.copy()
    noise = np.random.default_rng(1).normal(0, 0.05, closes[last + 1 :].shape)
    closes[last + 1 :] *= np.exp(noise)
    changed = data.prepare(YEARS, BINS, data_dir, PRICES._replace(closes=closes))
    for name in ("train", "validation"):
        for x, y in zip(markets[name], changed[name], strict=True):
            np.testing.assert_array_equal(x, y)

    def run(market):
        actions = train.act_in_order(state, market, CONTEXT)
        given = iter(actions)
        return actions, backtest.rollout(
            environment(market), lambda observation, info: next(given)
        )

    actions, episode = run(markets["test"])
    other_actions, other = run(changed["test"])
    decided = at - (CONTEXT - 1)  # the index of the decision on that day's close
    np.testing.assert_array_equal(actions[: decided + 1], other_actions[: decided + 1])
    np.testing.assert_array_equal(episode.rewards[:decided], other.rewards[:decided])
    assert (actions[decided + 1] != other_actions[decided + 1]).any()
    assert episode.rewards[decided] != other.rewards[decided]


@pytest.mark.full
def test_a_day_of_a_window_knows_nothing_of_later_ones(state):
    tokens = np.random.default_rng(2).integers(0, BINS, (1, CONTEXT, STOCKS))
    later = tokens.copy()
    later[:, 2:] = (later[:, 2:] + 1) % BINS
    apply = jax.jit(state.apply_fn)
    for one, two in zip(
        apply({"params": state.params}, tokens),
        apply({"params": state.params}, later),
        strict=True,
    ):
        np.testing.assert_array_equal(one[:, :2], two[:, :2])
        assert (np.asarray(one[:, 2:]) != np.asarray(two[:, 2:])).any()


@pytest.mark.full
def test_days_at_once_are_days_one_by_one(state, markets):
    market = Market(*(x[:90] for x in markets["test"]))
    at_once = train.act_in_order(state, market, CONTEXT)

    def act(observation, info):
        seen = np.zeros((train.CHUNK, *observation.shape), observation.dtype)
        seen[0] = observation  # the rest is filling: one program for both ways
        return np.asarray(train.act(state, seen))[0]

    env, actions = environment(market), []
    backtest.rollout(env, lambda *seen: actions.append(act(*seen)) or actions[-1])
    np.testing.assert_allclose(at_once, actions, atol=1e-6)


# --- baselines, figures, intervals


def test_baselines_do_what_they_are_called(markets):
    market = markets["test"]
    found = {
        name: backtest.rollout(environment(market), make())
        for name, make in backtest.BASELINES.items()
    }
    held = found["buy and hold"]
    np.testing.assert_allclose(held.turnovers[0], 1.0)
    np.testing.assert_allclose(held.turnovers[1:], 0.0, atol=1e-12)
    growth = np.prod(1 + market.returns[CONTEXT:].astype(np.float64), axis=0)
    assert np.exp(held.rewards.sum()) == pytest.approx(0.999 * growth.mean())

    monthly = found["equal weight, monthly"]
    traded = monthly.dates[monthly.turnovers > 1e-12].astype("datetime64[M]")
    assert len(traded) == len(set(traded)) == 12
    assert (found["equal weight, daily"].turnovers > 1e-12).all()


def test_figures_by_hand():
    returns = np.array([0.10, -0.20, 0.05, 0.05])
    log_returns = np.log1p(returns)
    expected = np.sqrt(252) * returns.mean() / returns.std(ddof=1)
    assert backtest.sharpe(log_returns) == pytest.approx(expected)
    assert backtest.max_drawdown(log_returns) == pytest.approx(0.20)
    assert backtest.max_drawdown(np.log1p([-0.5, 1.0])) == pytest.approx(0.5)
    annual = np.prod(1 + returns) ** (252 / 4) - 1
    assert backtest.annual_return(log_returns) == pytest.approx(annual)
    still = np.zeros(5)
    assert [f(still) for f in backtest.FIGURES.values()] == [0, 0, 0]


@hypothesis.given(
    strategies.lists(strategies.floats(-0.5, 0.5), min_size=2, max_size=30)
)
def test_properties_of_figures(rewards):
    rewards = np.array(rewards)
    wealth = np.concatenate([[1.0], np.exp(np.cumsum(rewards))])
    worst = max(
        1 - wealth[j] / wealth[i]
        for i in range(len(wealth))
        for j in range(i, len(wealth))
    )
    found = backtest.max_drawdown(rewards)
    assert found == pytest.approx(worst, abs=1e-9) and 0 <= found < 1
    # Order changes no Sharpe ratio and no return; figures of rows are rows of figures.
    turned = np.stack([rewards, rewards[::-1]])
    assert backtest.sharpe(turned)[1] == pytest.approx(float(backtest.sharpe(rewards)))
    assert backtest.max_drawdown(turned)[0] == found


def test_bootstrap_draws_blocks():
    days, block = 500, 10
    drawn = backtest.stationary_bootstrap(days, block, 400, seed=0)
    assert drawn.shape == (400, days)
    assert drawn.min() == 0 and drawn.max() == days - 1
    goes_on = (drawn[:, 1:] - drawn[:, :-1]) % days == 1
    assert (~goes_on).mean() == pytest.approx(1 / block, rel=0.05)
    # Every day is drawn as often as any other, at every place.
    assert np.bincount(drawn.ravel()).std() < 0.2 * 400
    again = backtest.stationary_bootstrap(days, block, 400, seed=0)
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.full
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_bootstrap_knows_how_sure_a_mean_is(memory):
    """For an autoregression of order 1, whose means have a known deviation."""
    days, rng = 4000, np.random.default_rng(0)
    x = rng.normal(size=days)
    for day in range(1, days):
        x[day] += memory * x[day - 1]
    drawn = backtest.stationary_bootstrap(days, 40, 500, seed=1)
    found = x[drawn].mean(axis=1).std()
    assert found == pytest.approx(1 / (1 - memory) / np.sqrt(days), rel=0.2)


def test_comparison_is_paired():
    rng = np.random.default_rng(0)
    dates = np.datetime64("2020-01-01") + np.arange(300)
    episode = backtest.Episode(dates, rng.normal(0, 0.01, 300), np.ones(300))
    # Ahead by the same bit every day: sure of that, whatever the market does.
    ahead = episode._replace(rewards=episode.rewards + 0.0005)
    found = backtest.compare(ahead, {"other": episode}, resamples=200)
    other = found["baselines"]["other"]
    low, high = other["difference_intervals"]["sharpe"]
    assert 0 < low < other["difference"]["sharpe"] < high
    assert found["intervals"]["sharpe"][0] < 0 < found["intervals"]["sharpe"][1]
    assert other["difference_intervals"]["turnover"] == [0, 0]
    json.dumps(found)


# --- training


@pytest.mark.full
def test_agent_learns_a_rule_that_wins(config, markets, tmp_path):
    config = dataclasses.replace(config, out=str(tmp_path))
    console = Console(width=200)
    with console.capture() as capture:
        state, history, summary = train.train(config, PRICES, console=console)
        console.print(report.table(summary["metrics"]))
    assert [row["step"] for row in history] == list(range(1, 61))
    assert summary["units"] == "bars" and not summary["diverged"]
    assert summary["val_loss"] == history[-1]["val_loss"]
    assert history[-1]["val_sharpe"] > 2

    metrics = summary["metrics"]
    for name, baseline in metrics["baselines"].items():
        low, _ = baseline["difference_intervals"]["sharpe"]
        assert low > 0, name
        assert f"agent - {name}" in capture.get()
    assert metrics["annual_return"] > 0.5
    # The rule: hold what was best today.
    market = data.after(markets["validation"], markets["test"], CONTEXT - 1)
    chosen = train.act_in_order(state, market, CONTEXT).argmax(axis=-1)
    best = market.returns[CONTEXT - 1 : -1].argmax(axis=-1)
    assert len(chosen) == len(markets["test"].dates) - 1
    assert (chosen == best).mean() > 0.7

    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "wealth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_resumed_run_is_the_uninterrupted_run(config, tmp_path):
    config = dataclasses.replace(
        config, optimizer="adamw", steps=6, eval_every=2, save_every=3, dropout=0.5
    )
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    expected, history, summary = train.train(whole, PRICES)

    # As if the run had been killed after its first checkpoint.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "6")
    killed = dataclasses.replace(config, out=str(tmp_path / "killed"), resume=True)
    again = train.train(killed, PRICES)
    assert again.summary["steps"] == 3
    leaves = zip(jax.tree.leaves(again.state), jax.tree.leaves(expected), strict=True)
    for leaf, other in leaves:
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()
    assert again.history == history
    assert again.summary["metrics"] == summary["metrics"]


@pytest.mark.full
def test_diverged_run_is_recorded(config):
    config = dataclasses.replace(
        config, steps=20, optimizer="sgd", learning_rate=1e30, param_dtype="float32"
    )
    summary = train.train(dataclasses.replace(config, clip=0.0), PRICES).summary
    assert summary["nonfinite"] and summary["diverged"] and summary["metrics"] == {}


def test_config():
    default = parse(train.Config, None, [])
    assert default == train.Config()
    options = read_toml("examples/trading/config.toml")
    assert parse(train.Config, None, ["--config", "examples/trading/config.toml"])
    assert options["optimizer"] == "adamw8"
    with pytest.raises(ValueError, match="give later years"):
        train.Config(validation_year=2020)
    with pytest.raises(ValueError, match="give 2 to 256"):
        train.Config(bins=300)
    with pytest.raises(ValueError, match="fraction"):
        train.Config(cost=0.7)
