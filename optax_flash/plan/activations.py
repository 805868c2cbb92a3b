r"""How many bytes a step needs beside weights, optimizer state and what comes in.

Of a transformer whose layers run under ``lax.scan``, with bfloat16 activations and an
attention that stores no scores (cuDNN's). With :math:`t` tokens on the device, width
:math:`D`, an MLP of :math:`F` and keys of :math:`K`, in numbers of two bytes:

* saved for the backward pass: :math:`t D` a layer with rematerialization; without it
  :math:`t (11 D + 6 F + 2 K)`, 13 :math:`D` where norms and MLP have biases, and for
  float32 params a bfloat16 copy of each layer's weights;
* one layer's backward pass at work: :math:`t (7 D + 3 F + 2 K)`, and 1.25 times its
  weights;
* logits of :math:`V` words: :math:`3 t V`, float32 and bfloat16.

Three moments may be the peak, and XLA's scheduling decides which:

* *backward*: what is saved, one layer at work, the gradients of all layers, and that of
  a tied embedding; 0.3 times the logits, for what XLA's buffer assignment loses when
  gradients take their place;
* *loss*: what is saved, the logits, then the head's gradient in the place of the
  float32 ones, or beside them, and not sharded yet, if they are made in pieces; a
  bfloat16 copy of the head where its params are sharded or float32;
* *early*: XLA may fill the gradients' buffers with zeros before the loss. It does where
  params are sharded, and the loss then has all of them; on one device it does where
  logits take less: what is saved, these buffers, 0.8 times the logits.

Coefficients are fitted to what XLA's buffer assignment takes for an H100;
``docs/plan.md`` has the differences.
"""

import dataclasses
from typing import NamedTuple

COMPUTE_BYTES = 2
"""Activations are bfloat16."""


class Gradients(NamedTuple):
    """Bytes of gradients on a device.

    Attributes:
      blocks: of all layers.
      layer: of one layer, or the largest.
      embed: of the embedding.
      head: of the head.
    """

    blocks: int
    layer: int
    embed: int
    head: int

    @property
    def total(self) -> int:
        return self.blocks + self.embed + self.head


class Load(NamedTuple):
    """What a device works on.

    Attributes:
      batch: examples on the device.
      length: tokens of each.
      remat: whether layers keep only their inputs for the backward pass.
      release: whether each layer's gradient is used and freed at once.
      loss_chunks: in how many pieces logits are made.
      gradients: bytes.
      layer_weights: bytes of one layer's weights in bfloat16, not sharded.
      head_weights: the same of the head, or of the embedding if that is the head.
      sharded: whether params are.
      cast: whether params are not bfloat16.
    """

    batch: int
    length: int
    remat: bool
    release: bool
    loss_chunks: int
    gradients: Gradients
    layer_weights: int
    head_weights: int
    sharded: bool
    cast: bool


class Temporaries(NamedTuple):
    """Bytes at the moment when a step takes most.

    Attributes:
      gradients: those that are held then.
      activations: all else that is neither params nor optimizer state.
    """

    gradients: int
    activations: int


@dataclasses.dataclass(frozen=True)
class Transformer:
    """What the activations of a transformer depend on.

    Attributes:
      layers: how many.
      width: of the residual stream.
      hidden: of the MLP.
      keys: heads of keys times their width.
      vocabulary: logits of each token; 0 where there are none to speak of.
      gated: whether the MLP has a gate (and no biases): Llama's, not GPT-2's.
      tied: whether the head is the embedding.
    """

    layers: int
    width: int
    hidden: int
    keys: int
    vocabulary: int
    gated: bool
    tied: bool

    def temporaries(self, load: Load) -> Temporaries:
        """What a step needs at its peak, beside weights and state."""
        tokens = load.batch * load.length
        inner = 3 * self.hidden + 2 * self.keys
        working = COMPUTE_BYTES * tokens * (7 * self.width + inner)
        working += load.layer_weights * 5 // 4
        saved = self.layers * self._saved(load)
        logits = 3 * COMPUTE_BYTES * tokens * self.vocabulary // load.loss_chunks
        grads = load.gradients

        tied = grads.embed if self.tied else 0
        head = tied or grads.head
        held, at_loss = tied + grads.blocks, head
        if load.release:
            # It is among the weights of the layer at work.
            held, working = tied + grads.layer, working - load.layer_weights
        elif load.sharded:
            at_loss += grads.blocks
            # Pieces of the head's gradient are summed before it is scattered.
            at_loss += load.head_weights * (load.loss_chunks > 1)
        copy = load.head_weights if load.cast or load.sharded else 0
        # Float32 logits are gone when the head's gradient comes, unless in pieces.
        words = logits - (load.loss_chunks == 1) * min(head, logits * 2 // 3)
        moments = [
            Temporaries(held, saved + working + logits * 3 // 10),
            Temporaries(at_loss, saved + words + copy),
        ]
        if not load.release:
            early = saved + min(logits, grads.blocks) * 8 // 10
            moments.append(Temporaries(held, early))
        return max(moments, key=sum)

    def _saved(self, load: Load) -> int:
        """Bytes that one layer leaves for its backward pass."""
        tokens = load.batch * load.length
        if load.remat:
            return COMPUTE_BYTES * tokens * self.width
        widths = 11 if self.gated else 13
        numbers = widths * self.width + 6 * self.hidden + 2 * self.keys
        return COMPUTE_BYTES * tokens * numbers + load.cast * load.layer_weights


@dataclasses.dataclass(frozen=True)
class Convolutions:
    """What the activations of a residual network depend on.

    Counted, not fitted: every convolution's output and what its norm makes of it are
    kept, in bfloat16.

    Attributes:
      stem: numbers that the first convolution makes of an image.
      blocks: for each block how many numbers come in, and how many its convolutions
        make.
    """

    stem: int
    blocks: tuple[tuple[int, int], ...]

    def temporaries(self, load: Load) -> Temporaries:
        """What a step needs at its peak, beside weights and state."""
        made = [2 * numbers for _, numbers in self.blocks]
        if load.remat:
            kept = sum(numbers for numbers, _ in self.blocks) + max(made)
        else:
            kept = sum(made)
        activations = COMPUTE_BYTES * load.batch * (2 * self.stem + kept)
        grads = load.gradients
        held = grads.layer if load.release else grads.total
        return Temporaries(held, activations)
