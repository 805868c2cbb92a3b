"""One condition on one workload: compiled once, run for any number of seeds."""

import functools
import json
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flash
from benchmarks.workloads import Workload
from optax_flash.flax import norm_paths

from .conditions import Condition
from .results import Results

CURVE_POINTS = 50


class Trainer:
    """Trains a workload under a condition.

    Args:
      workload: model and data.
      condition: optimizer and storage.
      learning_rate: the peak of the schedule, after a tenth of the steps.
      steps: of a run.
    """

    def __init__(
        self,
        workload: Workload,
        condition: Condition,
        learning_rate: float,
        steps: int,
    ):
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, max(1, steps // 10), steps
        )
        self._workload, self._condition = workload, condition
        self._learning_rate, self._steps = learning_rate, steps
        self._tx = condition.transformation(schedule)

    @property
    def name(self) -> str:
        """The condition's."""
        return self._condition.name

    @property
    def optimizer(self) -> str:
        """The condition's."""
        return self._condition.optimizer

    @property
    def workload(self) -> str:
        """The workload's name."""
        return self._workload.name

    def settings(self, seed: int) -> dict[str, Any]:
        """What decides a run's numbers, beside the code; "format" sums up the codecs.

        A run made under the same settings need not be made again.
        """
        params, _ = jax.eval_shape(self._start, 0)
        codecs = optax_flash.state_format(self._tx, params)
        return {
            "workload": self._workload.name,
            "optimizer": self._condition.optimizer,
            "storage": self._condition.storage,
            "seed": seed,
            "steps": self._steps,
            "learning_rate": self._learning_rate,
            "format": f"{zlib.crc32(json.dumps(codecs).encode()):08x}",
        }

    def run(self, seed: int) -> dict[str, Any]:
        """Trains from the seed's weights on the seed's data.

        Returns:
          The held-out "loss" (and "accuracy"); "train_loss", the mean over the last
          tenth of the steps; "curve", means over equal parts of the run; the bytes of
          the live params and state for each parameter; the seconds of the steps,
          the first two excepted, which compile.
        """
        params, state = self._start(seed)
        count = sum(p.size for p in jax.tree.leaves(params))
        nbytes = sum(x.nbytes for x in jax.tree.leaves((params, state)))
        losses, clock = [], 0.0
        for step in range(self._steps):
            if step == 2:
                jax.block_until_ready(params)
                clock = time.perf_counter()
            batch = self._workload.batch(seed, step)
            params, state, loss = self._step(params, state, batch)
            losses.append(loss)
        history = np.array(jax.device_get(losses), np.float64)
        seconds = time.perf_counter() - clock
        parts = np.array_split(history, min(CURVE_POINTS, self._steps))
        return {
            **self._workload.evaluate(self._weights(params, state)),
            "train_loss": history[-max(1, self._steps // 10) :].mean(),
            "curve": [part.mean() for part in parts],
            "bytes_per_parameter": nbytes / count,
            "seconds": seconds if self._steps > 2 else None,
        }

    def _start(self, seed: int) -> tuple[optax.Params, optax.OptState]:
        weights = self._workload.init(seed)
        if self._condition.nudged:
            weights = jax.tree.map(lambda w: jnp.nextafter(w, jnp.inf), weights)
        norms = frozenset(norm_paths(weights))
        params = optax_flash.cast_params(
            weights, self._condition.params, lambda path, _: path in norms
        )
        state = self._tx.init(params)
        if self._condition.residual is not None:
            state = optax_flash.set_master_params(state, params, weights)
        return params, state

    @functools.cached_property
    def _step(self) -> Any:
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            loss, grads = jax.value_and_grad(self._workload.loss)(params, batch)
            updates, state = self._tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return step

    def _weights(self, params: optax.Params, state: optax.OptState) -> optax.Params:
        """At full precision."""
        if self._condition.residual is None:
            return params
        return optax_flash.master_params(state, params)


def study(results: Results, trainers: Iterable[Trainer], seeds: Sequence[int]) -> None:
    """Makes the runs that the results do not hold yet.

    Args:
      results: where runs are looked for and added.
      trainers: of the conditions.
      seeds: of first weights and data.
    """
    for trainer in trainers:
        for seed in seeds:
            settings = trainer.settings(seed)
            if results.holds(settings):
                continue
            start = time.perf_counter()
            run = trainer.run(seed)
            results.add(settings | run)
            print(
                f"{settings['workload']:6} {trainer.name:40} seed {seed}  "
                f"loss {run['loss']:.4f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
