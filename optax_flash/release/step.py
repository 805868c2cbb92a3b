"""The train step: a backward pass that updates each layer as soon as it can."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_flash.release.model import Sequence, places_of
from optax_flash.release.update import EXACT, Part, Update, evaluate, scalars
from optax_flash.transforms import _arguments, _mirror

PyTree = Any
Step = Callable[..., tuple[Any, Any, Any]]
Arrays = dict[int, jax.Array]
Cotangent = list[jax.Array]


def train_step(
    model: Sequence,
    tx: optax.GradientTransformation,
    *,
    per_layer: optax.GradientTransformation | None = None,
) -> Step:
    """A train step in which no gradient outlives the layer that it belongs to.

    The forward pass keeps the input of each layer. The backward pass takes the layers
    in reverse: it computes a layer again, takes its gradients, updates its params and
    their state in place and drops the gradients. Params that several segments share are
    updated by the first of them, with the sum of their gradients. Results are those of
    ``jax.value_and_grad(model)``, ``tx.update`` and ``optax.apply_updates``.

    Args:
      model: of :func:`sequence`.
      tx: any transformation that updates each param by its own gradient; for stacks of
        layers, element by element. The state is that of ``tx.init(params)``.
      per_layer: a transformation without a state that each layer's gradients go through
        first, all params of the layer together: ``optax.clip_by_global_norm(1.0)``
        clips each layer's norm, of a stack each of its layers.

    Returns:
      ``step(params, opt_state, *batch) -> (loss, params, opt_state)``, with
      ``(loss, aux)`` in the place of the loss if the model has ``has_aux``. Run it
      under ``jax.jit(step, donate_argnums=(0, 1))``.

    Raises:
      TypeError: the arguments are swapped.
      ValueError: (the step, while it is traced) an update needs gradients of several
        segments, as a global norm does, or of several layers of a stack; the model's
        names do not fit the params. The message names the param.

    Example:
      >>> import jax, jax.numpy as jnp, optax_flash, optax_flash.release as release
      >>> model = release.sequence(
      ...     release.layer("first", lambda w, x: x @ w),
      ...     release.scan("blocks", lambda w, x, _: x + jnp.tanh(x @ w)),
      ...     release.layer("last", lambda w, x, _: jnp.mean((x @ w) ** 2)),
      ... )
      >>> params = {
      ...     "first": jnp.ones((64, 64)),
      ...     "blocks": jnp.zeros((3, 64, 64)),
      ...     "last": jnp.ones((64, 1)),
      ... }
      >>> tx = optax_flash.adamw8(1e-3)
      >>> step = jax.jit(release.train_step(model, tx), donate_argnums=(0, 1))
      >>> x, opt_state = jnp.ones((2, 64)), tx.init(params)
      >>> first, params, opt_state = step(params, opt_state, x)
      >>> second, params, opt_state = step(params, opt_state, x)
      >>> bool(second < first)
      True

    References:
      LOMO (arXiv 2306.09782) fuses SGD into the backward pass; FlashOptim (arXiv
      2602.23349) releases gradients so for 8-bit AdamW.
    """

    _arguments.check_transformation(tx, (model,), "train_step(model, tx)")

    def step(params: Any, opt_state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        call = "step(params, opt_state, *batch)"
        _arguments.check_order(opt_state, params, call)
        return _Backward(model, tx, per_layer, params, opt_state, batch).run()

    return step


class _Backward:
    """One train step.

    Attributes:
      old: the leaves of params and state before the step, by their positions.
      leaves: the same; new ones take their places.
      parts: the update of what each segment owns: of params that several share, the
        first one has the last gradient.
      sums: gradients of shared params that are not complete.
      reduced: values of the parts' reductions.
    """

    def __init__(
        self,
        model: Sequence,
        tx: optax.GradientTransformation,
        per_layer: optax.GradientTransformation | None,
        params: Any,
        opt_state: Any,
        batch: tuple[Any, ...],
    ):
        _mirror.check_floating(params, "release")
        self.model, self.per_layer, self.batch = model, per_layer, batch
        self.places = places_of(model, params)
        self.update = Update(tx, params, opt_state)
        leaves, self.treedef = jax.tree.flatten((params, opt_state))
        self.old = [jnp.asarray(x) for x in leaves]
        self.leaves = list(self.old)
        self.parts: list[list[Part]] = []
        owned: set[int] = set()
        for segment, place in zip(model.segments, self.places, strict=True):
            own = set(place.leaves) - owned
            owned |= own
            layers = self.old[place.leaves[0]].shape[0] if segment.stacked else None
            self.parts.append(self.update.parts(own, layers))
        self.rest = self.update.rest([x for parts in self.parts for x in parts])
        self.known = self.update.environment(self.old)
        self.sums: dict[int, jax.Array] = {}
        self.reduced: dict[Any, jax.Array] = {}

    def run(self) -> tuple[Any, Any, Any]:
        """``(loss, params, opt_state)``."""
        inputs = self._forward()
        last = len(inputs) - 1
        params = self.places[last].take(self.old)
        layer = _Layer(self.model.segments[last].function, inputs[last], self.batch)
        loss, grads, cotangent = layer.loss(params, self.model.has_aux)
        cotangent = self._update(last, grads, cotangent)
        for i in reversed(range(last)):
            if self.model.segments[i].stacked:
                cotangent = self._stack(i, inputs[i], cotangent)
                continue
            params = self.places[i].take(self.old)
            # Or XLA would keep what the forward pass computed inside of the layer.
            params, x, cotangent = lax.optimization_barrier(
                (params, inputs[i], cotangent)
            )
            layer = _Layer(self.model.segments[i].function, x, self.batch)
            cotangent = self._update(i, *layer.gradients(params, cotangent))
        env = self.known | {
            x: self.leaves[j]
            for parts in self.parts
            for part in parts
            for j, x in part.variables()
        }
        for j, x in evaluate(self.rest, env | self.reduced)[0].items():
            self.leaves[j] = x
        params, opt_state = self.treedef.unflatten(self.leaves)
        return loss, params, opt_state

    def _forward(self) -> list[tuple[Any, ...]]:
        """The input of each segment; of a stack, those of its layers, stacked."""
        x: tuple[Any, ...] = ()
        inputs = []
        for segment, place in zip(self.model.segments[:-1], self.places, strict=False):
            params = place.take(self.old)
            if segment.stacked:

                def body(x: Any, params: Any, function: Any = segment.of_stack) -> Any:
                    return function(params, x, *self.batch), x

                out, kept = lax.scan(body, x[0], params)
                inputs.append((kept,))
            else:
                out = segment.function(params, *x, *self.batch)
                inputs.append(x)
            x = (out,)
        return [*inputs, x]

    def _update(self, i: int, grads: PyTree, cotangent: Cotangent) -> Cotangent:
        """Updates the params of segment ``i``; gives the cotangent, once it is done."""
        (part,), place = self.parts[i], self.places[i]
        for j, grad in zip(place.leaves, jax.tree.leaves(grads), strict=True):
            self.sums[j] = self.sums[j] + grad if j in self.sums else grad
        complete = {j: self.sums.pop(j) for j in part.params}
        complete = self._clipped(complete, {j: self.old[j] for j in part.params})
        env = {self.update.grads[j]: x for j, x in complete.items()}
        new, reduced = evaluate(part, self.known | env)
        self.reduced.update(zip(part.reductions, reduced, strict=True))
        # Nothing further down may begin while these gradients live.
        cotangent, new = lax.optimization_barrier((cotangent, new))
        for j, x in new.items():
            self.leaves[j] = x
        return cotangent

    def _stack(self, i: int, inputs: tuple[Any], cotangent: Cotangent) -> Cotangent:
        """Updates a stack of layers, from the last to the first."""
        parts, place = self.parts[i], self.places[i]
        function = self.model.segments[i].function
        positions = {x: j for j, x in enumerate(self.update.operands)}
        known = [scalars(part, self.known) for part in parts]

        equations = {x: eqn for part in parts for x, eqn in part.reductions.items()}
        combine = {x: EXACT[eqn.primitive.name] for x, eqn in equations.items()}

        def body(carry: Any, layer: tuple[Any, Any]) -> Any:
            cotangent, stacks, reduced = carry
            index, x = layer
            partial: list[Any] = []

            def at(x: jax.Array) -> jax.Array:
                return lax.dynamic_slice_in_dim(x, index, 1)

            def stack(x: Any) -> jax.Array:
                j = positions.get(x, -1)
                return stacks[j] if j in stacks else self.known[x]

            params = {j: at(stack(self.update.operands[j]))[0] for j in place.leaves}
            grads, cotangent = _Layer(function, x, self.batch).gradients(
                place.treedef.unflatten(params.values()), cotangent
            )
            # All that reads the params comes before they are written over.
            grads, cotangent = lax.optimization_barrier((grads, cotangent))
            by_position = zip(place.leaves, jax.tree.leaves(grads), strict=True)
            grads = self._clipped(dict(by_position), params)
            for part, of_scalars in zip(parts, known, strict=True):
                env = of_scalars | {
                    self.update.grads[j]: grads[j][None] for j in part.params
                }
                env |= {x: at(stack(x)) for x in self.update.arrays(part)}
                stepped, of_part = evaluate(part, env, index)
                partial += of_part
                for j, x in stepped.items():
                    stacks = stacks | {
                        j: lax.dynamic_update_slice_in_dim(stacks[j], x, index, 0)
                    }
                stacks, grads = lax.optimization_barrier((stacks, grads))
            reduced = [
                function(a, b)
                for (function, _), a, b in zip(
                    combine.values(), reduced, partial, strict=True
                )
            ]
            return (cotangent, stacks, reduced), None

        layers = self.old[place.leaves[0]].shape[0]
        stacks = {j: self.old[j] for part in parts for j in part.results}
        begin = [jnp.asarray(zero, x.aval.dtype) for x, (_, zero) in combine.items()]
        (cotangent, stacks, reduced), _ = lax.scan(
            body,
            (cotangent, stacks, begin),
            (jnp.arange(layers, dtype=jnp.int32), inputs),
            reverse=True,
        )
        self.reduced.update(zip(combine, reduced, strict=True))
        for j, x in stacks.items():
            self.leaves[j] = x
        return cotangent

    def _clipped(self, grads: Arrays, params: Arrays) -> Arrays:
        """The gradients of one layer after ``per_layer``; all by their positions."""
        if self.per_layer is None or not grads:
            return grads
        names = [self.update.names[j] for j in grads]
        tree = dict(zip(names, grads.values(), strict=True))
        like = dict(zip(names, params.values(), strict=True))
        state = self.per_layer.init(like)
        if jax.tree.leaves(state):
            raise ValueError(
                "release.train_step: per_layer keeps a state, "
                f"{_mirror.leaf_paths(state)[:5]}. Only transformations without one, "
                "such as optax.clip_by_global_norm, can see the gradients of one layer "
                "after another; put others into tx."
            )
        clipped: Any = self.per_layer.update(tree, state, like)[0]
        return {
            j: clipped[name].astype(grad.dtype)
            for (j, grad), name in zip(grads.items(), names, strict=True)
        }


class _Layer(NamedTuple):
    """One layer in the backward pass.

    Attributes:
      function: of the segment.
      x: the input, in a tuple; empty in a model's first segment.
      batch: the model's.
    """

    function: Callable[..., Any]
    x: tuple[Any, ...]
    batch: tuple[Any, ...]

    def loss(self, params: PyTree, has_aux: bool) -> tuple[Any, PyTree, Cotangent]:
        """The last layer's ``(loss, aux)``, its gradients and its input's cotangent."""
        floats, join = _floats(self.x)

        def function(params: PyTree, floats: Cotangent) -> tuple[Any, Any]:
            out = self.function(params, *join(floats), *self.batch)
            return out if has_aux else (out, None)

        (loss, aux), gradients = jax.value_and_grad(
            function, argnums=(0, 1), has_aux=True
        )(params, floats)
        return ((loss, aux) if has_aux else loss), *gradients

    def gradients(
        self, params: PyTree, cotangent: Cotangent
    ) -> tuple[PyTree, Cotangent]:
        """The gradients of another layer, and its input's cotangent."""
        floats, join = _floats(self.x)

        def function(params: PyTree, floats: Cotangent) -> Cotangent:
            return _floats(self.function(params, *join(floats), *self.batch))[0]

        _, pull = jax.vjp(function, params, floats)
        return pull(cotangent)


def _floats(tree: PyTree) -> tuple[Cotangent, Callable[[Cotangent], PyTree]]:
    """The leaves that have gradients, and how to put others in their places."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [
        i
        for i, x in enumerate(leaves)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]

    def join(floats: Cotangent) -> PyTree:
        joined = list(leaves)
        for i, x in zip(places, floats, strict=True):
            joined[i] = x
        return treedef.unflatten(joined)

    return [leaves[i] for i in places], join
