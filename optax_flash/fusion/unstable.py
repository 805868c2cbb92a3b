"""What of JAX may change in any release: all of it comes into the library through here.

Kernel languages aside, which only their backends import. JAX gives no promise for
``jax.extend.core``, ``jax.interpreters`` and ``jax.experimental``; where a new release
breaks the library, this is the file to look at first.
"""

from jax.experimental.custom_partitioning import ArrayMapping as ArrayMapping
from jax.experimental.custom_partitioning import SdyShardingRule as SdyShardingRule
from jax.experimental.custom_partitioning import (
    custom_partitioning as custom_partitioning,
)
from jax.experimental.xla_metadata import set_xla_metadata as set_xla_metadata
from jax.extend import core as core
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir
