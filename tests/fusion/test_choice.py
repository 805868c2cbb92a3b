"""Which kernels an NVIDIA GPU gets, by what is installed and what kind it is."""

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import optax_flash
from optax_flash.fusion import backends, fuse
from optax_flash.fusion.backends import Target, choose, jax_triton, pallas_triton
from optax_flash.fusion.backends import gpu as gpus

H100 = gpus.Gpu("NVIDIA H100", 90)


@pytest.fixture(name="program")
def program_fixture():
    params = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    tx = optax_flash.compress(optax.adam(1e-3))
    state = jax.eval_shape(tx.init, params)
    with fuse.watch() as leaves:
        jax.eval_shape(tx.update, params, state, params)
    ((leaf, _),) = leaves
    return leaf.program


def chosen(program, gpu=H100):
    """The name of the backend that runs a program on an NVIDIA GPU, and why."""
    backend, reason = choose(program, None, Target("cuda", gpu))
    return backend.name, reason


@pytest.fixture(name="installed")
def installed_fixture(monkeypatch):
    """jax-triton and JAX's CUDA plugin, as far as one can see from outside."""
    monkeypatch.setattr(jax_triton, "absent", lambda: None)


def without_module(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else find(name)
    )


@pytest.mark.usefixtures("installed")
def test_triton_comes_first(program):
    assert chosen(program) == ("triton", "elementwise")


def test_pallas_comes_where_jax_triton_is_absent(program, monkeypatch):
    without_module(monkeypatch, "jax_triton")
    found = chosen(program)
    assert found == ("pallas", "elementwise; jax-triton is not installed")


def test_xla_comes_where_both_are(program, monkeypatch):
    monkeypatch.setattr(jax_triton, "absent", lambda: "jax-triton is not installed")
    # As in a release of JAX that has none: nothing may need it to be imported.
    gone = "jax.experimental.pallas.triton"
    monkeypatch.setitem(sys.modules, gone, None)
    monkeypatch.delattr(gone, raising=False)
    monkeypatch.setattr(backends, "pallas_triton", pallas_triton)
    monkeypatch.delitem(sys.modules, pallas_triton.__name__)
    name, reason = chosen(program)
    assert name == "xla"
    assert "does not lower Pallas" in reason and "jax-triton is not" in reason


@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.usefixtures("installed")
def test_an_old_gpu_gets_xla(program, capability):
    name, reason = chosen(program, gpus.Gpu("old", capability))
    assert name == "xla" and f"7.{capability % 10}, and Triton needs 8.0" in reason


@pytest.mark.usefixtures("installed")
def test_an_unknown_gpu_gets_xla(program):
    name, reason = chosen(program, None)
    assert name == "xla" and "AbstractDevice" in reason


def test_jax_triton_without_the_cuda_plugin_is_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("jaxlib.gpu_triton", types.ModuleType("gpu_triton"))
    assert "CUDA plugin" in jax_triton.absent()


def test_jax_triton_that_does_not_import_is_absent(monkeypatch):
    plugin = types.ModuleType("gpu_triton")
    plugin.TritonKernel = object
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("jaxlib.gpu_triton", plugin)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert "cannot be imported" in jax_triton.absent()


def test_the_abstract_device_says_what_to_compile_for():
    device = AbstractDevice("NVIDIA B200", None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert gpus.of_lowering(None) == gpus.Gpu("NVIDIA B200", 100)


@pytest.mark.parametrize("kind, name", [("Tesla T4", "7.5"), ("Unheard of", "names")])
@pytest.mark.usefixtures("installed")
def test_a_name_never_falls_back(kind, name, monkeypatch):
    monkeypatch.setattr(gpus, "at_hand", lambda: None)
    tx = optax_flash.compress(optax.adam(1e-3), implementation="triton")
    params = jnp.ones((128, 64))
    state = tx.init(params)
    device = AbstractDevice(kind, None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        with pytest.raises(ValueError, match=f"'triton' cannot be compiled.*{name}"):
            traced = jax.jit(tx.update).trace(params, state, params)
            traced.lower(lowering_platforms=("cuda",))


@pytest.mark.cuda
def test_a_step_is_exported_where_its_gpu_is_named():
    tx = optax_flash.adamw8(1e-3)
    params = jnp.ones((128, 64))
    state = tx.init(params)
    device = AbstractDevice("NVIDIA H100", None, "gpu")
    target = "triton_kernel_call" + ("_ffi" if jax_triton.takes_references() else "")
    allowed = jax.export.DisabledSafetyCheck.custom_call(target)

    def export(checks):
        return jax.export.export(
            jax.jit(tx.update), platforms=["cuda"], disabled_checks=checks
        )(params, state, params)

    mesh = AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert f"@{target}(" in export([allowed]).mlir_module()
        with pytest.raises(ValueError, match="no compatibility guarantees"):
            export([])
    # Which GPU is not known: XLA.
    assert target not in export([]).mlir_module()
