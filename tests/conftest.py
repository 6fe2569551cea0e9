"""Eight CPU devices, strict numerics and strict warnings for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("OPD_JAX_TEST_CACHE", str(Path.home() / ".cache" / "opd_jax" / "tests")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="module", autouse=True)
def _release_programs():
    """Let go of a module's compiled programs: each holds memory maps, and Linux limits those."""
    yield
    jax.clear_caches()


def pytest_make_parametrize_id(val):
    """Bytes give a test no name: pytest-xdist wants one collection in every process."""
    return "bytes" if isinstance(val, bytes) else None
