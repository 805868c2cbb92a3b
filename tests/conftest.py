"""Eight CPU devices, so that sharding is tested everywhere; and quick compilation."""

import os

import jax
import pytest
from jax._src import compiler

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"


@pytest.fixture(name="quick_compile")
def quick_compile_fixture():
    """Less optimised programs: for tests of what is computed, not of how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(name="quickest_compile", scope="module")
def quickest_compile_fixture():
    """And with the emitters that compile twice as fast, which round elsewhere.

    They put fused multiply-adds in other places than those that users have: for a
    module whose tests are not of last bits, or give ``compiler_options`` of their own.
    JAX has no setting for XLA's options, and XLA_FLAGS would change them for all tests.
    """
    options = compiler.get_compile_options

    def quickest(*args, env_options_overrides=None, **kwargs):
        overrides = {"xla_cpu_use_fusion_emitters": False}
        overrides |= env_options_overrides or {}
        return options(*args, env_options_overrides=overrides, **kwargs)

    # What is compiled stays within the module.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quickest)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
