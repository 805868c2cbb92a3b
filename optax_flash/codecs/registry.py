"""Codecs by name."""

from collections.abc import Mapping
from types import MappingProxyType

from optax_flash.codecs.affine import Affine4, Affine8
from optax_flash.codecs.base import Codec
from optax_flash.codecs.companded import Companded4, Companded8
from optax_flash.codecs.flashoptim import FlashOptim8

CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        codec.name: codec()
        for codec in (Companded8, Companded4, FlashOptim8, Affine8, Affine4)
    }
)
"""Every codec by its name, with its default group."""


def get_codec(codec: str | Codec) -> Codec:
    """The codec of a name; a codec passes through.

    Raises:
      ValueError: nothing is known by that name.
    """
    if isinstance(codec, Codec):
        return codec
    if isinstance(codec, str) and codec in CODECS:
        return CODECS[codec]
    raise ValueError(
        f"Unknown codec {codec!r}. Known names: {', '.join(CODECS)}. None leaves an "
        "array as it is; a Codec object sets the group too, as in "
        "optax_flash.Companded8(group=64). Codecs of residuals are for "
        "optax_flash.master_weights."
    )
