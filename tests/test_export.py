"""Weights as safetensors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

import optax_flash
from optax_flash import load_safetensors, save_safetensors


@pytest.fixture(name="trained", scope="module")
def trained_fixture():
    """Weights of 24 bits that bfloat16 does not hold."""
    weights = {"layer": {"kernel": jnp.linspace(0.1, 1, 64 * 64).reshape(64, 64)}}
    params = optax_flash.cast_params(weights, jnp.bfloat16)
    params["count"] = jnp.arange(3, dtype=jnp.float32)
    weights["count"] = params["count"]
    state = optax_flash.master_weights(optax.sgd(0.1)).init(params)
    return params, optax_flash.set_master_params(state, params, weights)


def test_float32_weights_with_their_residuals(trained, tmp_path):
    params, state = trained
    path = tmp_path / "model.safetensors"
    save_safetensors(path, params, state, metadata={"step": "7"})
    expected = optax_flash.master_params(params, state)
    read = safetensors.numpy.load_file(path)
    assert set(read) == {"layer.kernel", "count"}
    assert read["layer.kernel"].dtype == np.float32
    assert (read["layer.kernel"] == expected["layer"]["kernel"]).all()
    assert (read["layer.kernel"] != params["layer"]["kernel"]).any()
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"step": "7"}
    again = load_safetensors(path, params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert (again["layer"]["kernel"] == expected["layer"]["kernel"]).all()
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_bfloat16_weights(trained, tmp_path):
    params, state = trained
    path = tmp_path / "model.safetensors"
    save_safetensors(path, params, state, dtype=jnp.bfloat16, separator="/")
    read = load_safetensors(path, params, separator="/")
    expected = optax_flash.master_params(params, state)["layer"]["kernel"]
    assert read["layer"]["kernel"].dtype == jnp.bfloat16
    assert (read["layer"]["kernel"] == expected.astype(jnp.bfloat16)).all()
    save_safetensors(path, params, dtype=None)  # replaces it
    read = safetensors.numpy.load_file(path)
    assert read["layer.kernel"].dtype.name == "bfloat16"
    assert read["count"].dtype == np.float32


def test_bad_input(trained, tmp_path, monkeypatch):
    params, state = trained
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no file .*model"):
        load_safetensors(path, params)
    with pytest.raises(ValueError, match="one name with '.'"):
        save_safetensors(path, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    save_safetensors(path, params, state)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"has nothing at 'b' where an array \[2\]"):
        load_safetensors(path, {"b": jnp.ones(2)})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "serialize_file", full)
        with pytest.raises(OSError, match="was not written: .*No space left"):
            save_safetensors(path, params)
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_safetensors(path, params)
