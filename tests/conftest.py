"""Eight CPU devices, so that sharding is tested everywhere; and quick compilation."""

import os

import jax
import pytest

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"


@pytest.fixture(name="quick_compile")
def quick_compile_fixture():
    """Less optimised programs: for tests of what is computed, not of how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
