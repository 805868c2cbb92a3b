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
    expected = optax_flash.master_params(state, params)
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
    expected = optax_flash.master_params(state, params)["layer"]["kernel"]
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
            save_safetensors(path, params, state)
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_safetensors(path, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_params_without_their_state(dtype, tmp_path):
    """A float32 file of them would lack the weights' lower bits without a word."""
    path, params = tmp_path / "model.safetensors", {"w": jnp.full(4, 1.001, dtype)}
    with pytest.raises(ValueError, match=r"'w'.*lower bits.*params, state\)"):
        save_safetensors(path, params)
    if dtype == jnp.bfloat16:
        # Of as many bytes, but float16 has three more bits of a weight near 1.
        with pytest.raises(ValueError, match="lower bits"):
            save_safetensors(path, params, dtype=jnp.float16)
    assert not path.exists()
    save_safetensors(path, params, without_state=True)
    read = safetensors.numpy.load_file(path)["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.asarray(params["w"], np.float32))
    for wanted in (None, dtype):
        save_safetensors(path, params, dtype=wanted)
        read = safetensors.numpy.load_file(path)["w"]
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, params["w"])
    save_safetensors(path, {"w": jnp.full(4, 1.001)})
    assert (safetensors.numpy.load_file(path)["w"] == np.float32(1.001)).all()
