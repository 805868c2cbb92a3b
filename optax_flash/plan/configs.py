"""Models from the configuration files that Hugging Face keeps beside weights."""

from collections.abc import Mapping
from typing import Any

from optax_flash.plan import models
from optax_flash.plan.names import look_up


def from_config(config: Mapping[str, Any], name: str = "") -> models.Model:
    """A model from the content of a ``config.json``.

    Args:
      config: of a "llama" or "gpt2", as ``json.load`` gives it.
      name: for titles; "" takes the configuration's ``model_type``.

    Raises:
      ValueError: another ``model_type``, or a size is missing. The message says which.

    Example:
      >>> from optax_flash.plan import from_config
      >>> config = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768}
      >>> from_config(config).size
      124439808
    """
    kind = config.get("model_type", "")
    make = look_up("The config's model_type", _KINDS, kind)
    try:
        return make(config, name or kind)
    except KeyError as error:
        raise ValueError(
            f"The config of a {kind!r} has no {error.args[0]!r}, which tells its shapes"
        ) from None


def _llama(config: Mapping[str, Any], name: str) -> models.Model:
    heads = config["num_attention_heads"]
    return models.llama(
        name,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        hidden=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        head_width=config.get("head_dim"),
        length=config.get("max_position_embeddings", 8_192),
    )


def _gpt2(config: Mapping[str, Any], name: str) -> models.Model:
    return models.gpt2(
        name,
        layers=config["n_layer"],
        width=config["n_embd"],
        vocabulary=config.get("vocab_size", 50_257),
        length=config.get("n_positions", 1_024),
        hidden=config.get("n_inner"),
    )


_KINDS = {"llama": _llama, "gpt2": _gpt2}
