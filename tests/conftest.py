"""Eight CPU devices, strict numerics, strict warnings and quick compiling for every test.

Compiling is most of what the tests cost, and what comes after XLA's own passes most of that: a
program's operations, collectives and sharding stay as they are, but its fusions are written without
MLIR and LLVM optimizes nothing. What is made of two programs may then differ in other bits than a
user's, so tests that compare bits of different programs, and those of real models and of compilers,
are marked ``optimized`` and compile as users do. Processes that tests start compile likewise.
"""

import collections
import gc
import inspect
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One cache of compiled programs for all tests and all processes that they start, of every program:
# jax itself keeps those that took a second, and here few do.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "OPD_JAX_TEST_CACHE", os.path.expanduser("~/.cache/opd_jax/tests")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from jax._src import compiler

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


_QUICK = os.environ["XLA_FLAGS"]
_AS_USERS = " ".join(
    flag
    for flag in _QUICK.split()
    if not flag.startswith(("--xla_backend_optimization_level", "--xla_cpu_use_fusion_emitters"))
)


def _options(*args, make=compiler.get_compile_options, **kwargs):
    """What jax tells XLA of a program: ``XLA_FLAGS`` are read once, and this is asked each time."""
    is_quick = os.environ["XLA_FLAGS"] == _QUICK
    if not is_quick and kwargs["backend"].platform == "cpu":
        emitters = {"xla_cpu_use_fusion_emitters": True}
        kwargs["env_options_overrides"] = emitters | (kwargs["env_options_overrides"] or {})
    options = make(*args, **kwargs)
    if not is_quick:
        options.executable_build_options.debug_options.xla_backend_optimization_level = 3
    return options


compiler.get_compile_options = _options


# Files that take longest, longest first: most start processes. pytest-xdist would begin with the
# files of most tests, which these are not, and at the end one worker would wait for the other.
_FIRST = (
    "test_resume_matrix.py",
    "test_launchers.py",
    "test_crew.py",
    "test_bad_inputs.py",
    "test_studies.py",
    "test_teachers.py",
    "test_experts.py",
    "test_api.py",
    "test_resume.py",
    "test_sweep.py",
    "test_rollout_mesh.py",
    "test_packed_run.py",
    "test_processes_knockout.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first, then those of most tests; a file's tests keep their order."""
    place = {name: rank for rank, name in enumerate(_FIRST)}
    number = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (place.get(item.path.name, len(place)), -number[item.path]))


def pytest_collection_finish():
    """Tracing makes many objects that stay: look at them for garbage less often."""
    gc.set_threshold(100_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the fixtures of a test, which compile too."""
    flags = _QUICK if item.get_closest_marker("optimized") is None else _AS_USERS
    if os.environ["XLA_FLAGS"] != flags:
        os.environ["XLA_FLAGS"] = flags
        jax.clear_caches()  # of programs that were compiled the other way


# Each compiled program holds memory maps, and Linux allows a process 65,530 of them by default.
_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _release_programs(request):
    """Let go of compiled programs after a module that leaves many: the next may use the same.

    One that patches what programs are made of begins without those of others and leaves none.
    """
    source = inspect.getsource(request.module)
    is_patching = any(word in source for word in ("patch.setattr(", "patch.object("))
    if is_patching:
        jax.clear_caches()
    yield
    maps = Path("/proc/self/maps")
    if is_patching or not maps.exists() or maps.read_bytes().count(b"\n") > _MAPS:
        jax.clear_caches()


def pytest_make_parametrize_id(val):
    """Bytes give a test no name: pytest-xdist wants one collection in every process."""
    return "bytes" if isinstance(val, bytes) else None
