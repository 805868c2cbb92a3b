"""Eight CPU devices, so that sharding is tested everywhere; and quick compilation."""

import os

import jax
import pytest

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"


def pytest_configure(config):
    """What one test has compiled, no other test and no later run compiles again."""
    # Of what is compiled for GPUs, the text is looked at, which a cached one lacks.
    if config.option.markexpr == "cuda":
        return
    # Each worker has its own folder, for JAX does not lock the files.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = config.rootpath / ".pytest_cache" / "jax" / jax.__version__ / worker
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(name="quick_compile")
def quick_compile_fixture():
    """Less optimised programs: for tests of what is computed, not of how fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(name="strict_types")
def strict_types_fixture():
    """No dtype is promoted, and no axis is added, that nobody asked for."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(name="cache_environment", scope="session")
def cache_environment_fixture():
    """Variables by which another process shares this one's compiled programs."""
    folder = jax.config.jax_compilation_cache_dir
    return {
        "JAX_COMPILATION_CACHE_DIR": folder or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
