"""Gradient release: params updated during the backward pass, each gradient freed."""

from optax_flash.release.model import Sequence as Sequence
from optax_flash.release.model import layer as layer
from optax_flash.release.model import scan as scan
from optax_flash.release.model import sequence as sequence
from optax_flash.release.step import train_step as train_step
