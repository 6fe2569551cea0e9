"""A model goes to its devices block by block: the same bits, little of the host's memory."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import Layout

from opd_jax import mesh
from opd_jax.models import hf, params, streaming, transformer

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = ("qwen3_untied_sharded", "qwen3_moe_untied_mixed_sharded", "mixtral_untied_fused")
WIDE = transformer.ModelConfig(
    model_type="qwen3",
    vocab_size=4096,
    width=512,
    ffn=2048,
    num_layers=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    tied=True,
    qk_norm=True,
    max_positions=64,
)
MIB = 2**20


@pytest.mark.parametrize("limit", [1, 300, 1_500])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_any_size_give_the_same_bits(monkeypatch, case, dtype, limit):
    cfg, whole = hf.load(GOLDENS / case, dtype=dtype)
    written = streaming.written
    counted = []
    monkeypatch.setattr(streaming, "written", lambda *a: counted.append(a[0].size) or written(*a))
    monkeypatch.setattr(streaming, "BLOCK_BYTES", limit)
    for grid in (None, mesh.make(data=2, fsdp=2, model=2)):
        counted.clear()
        _, found = hf.load(GOLDENS / case, dtype=dtype, mesh=grid)
        assert any(counted), "nothing was cut"
        jax.tree.map(np.testing.assert_array_equal, found, whole)
        if grid is not None:
            places = params.shardings(transformer.specs(cfg), grid)
            assert jax.tree.map(lambda x: x.sharding, found) == places


@pytest.mark.parametrize(
    ("shape", "axes", "lead"),
    [
        ((6, 8, 4), (None, "fsdp", None), 1),
        ((3, 8, 4, 2), (None, "model", "fsdp", None), 2),
        ((5, 4), (None, "model"), 1),
        ((8, 4), ("model", "fsdp"), 0),
    ],
)
def test_blocks_cover_an_array_once_and_keep_their_bound(monkeypatch, shape, axes, lead):
    grid = mesh.make(data=2, fsdp=2, model=2)
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for limit, place in itertools.product((1, 64, 200, 10**6), (None, P(*axes))):
        monkeypatch.setattr(streaming, "BLOCK_BYTES", limit)
        sharding = place and NamedSharding(grid, place)
        cut = streaming.blocks(shape, sharding, np.float32, lead=lead)
        sizes: list[int] = []

        def read(index, sizes=sizes):
            sizes.append(whole[index].nbytes)
            return whole[index]

        array, largest = None, 0
        for start in cut.starts():
            before = len(sizes)
            array = streaming.written(cut, np.float32, read, array, start)
            largest = max(largest, sum(sizes[before:]))
        np.testing.assert_array_equal(array, whole)
        assert sum(sizes) == whole.nbytes  # every value once, for all replicas
        # No axis is cut finer than to one index of each of its shards.
        least = whole.nbytes
        for axis in range(lead):
            least //= cut.shard[axis]
        assert largest <= max(limit, least)


# --- memory ---------------------------------------------------------------------------------------

# Peak resident memory, pages of mapped files included, while a model is loaded.
PEAK = """
import re, sys
import jax, jax.numpy as jnp
from opd_jax import mesh
from opd_jax.models import hf

folder, devices = sys.argv[1], int(sys.argv[2])
grid = mesh.make(fsdp=2, model=2) if devices == 4 else None
jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()

def status(name):
    return int(re.search(name + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = status("VmRSS")
_, tree = hf.load(folder, mesh=grid)
jax.block_until_ready(tree)
print("PEAK", status("VmHWM") - before, sum(x.nbytes for x in jax.tree.leaves(tree)))
"""


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A model of 370 MiB in 20 files, whose largest leaf takes 96 MiB and tensor 8."""
    folder = tmp_path_factory.mktemp("many") / "model"
    declared = transformer.specs(WIDE)
    tree = jax.tree.map(
        lambda spec: np.full(spec.shape, 0.5, np.float32),
        declared,
        is_leaf=lambda x: isinstance(x, params.ParamSpec),
    )
    hf.save(folder, WIDE, tree, max_shard_bytes=20 * MIB)
    assert len(list(folder.glob("*.safetensors"))) > 15
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells of its peak there")
@pytest.mark.parametrize("devices", [1, 4])
def test_a_host_needs_little_more_than_what_its_devices_hold(many_shards, devices):
    """The devices are the host's own memory here, so that is subtracted."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(many_shards), str(devices)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, re.search(r"PEAK (\d+) (\d+)", done.stdout).groups())
    assert size > 360 * MIB
    # Two blocks in flight, the tensors they are made of, two open files, and XLA's own.
    assert peak - size < 250 * MIB, (peak / MIB, size / MIB)


# --- processes ------------------------------------------------------------------------------------

# Counts the bytes that each process of a run reads of the weights.
COUNTED = """
import jax
from opd_jax import mesh
from opd_jax.models import hf, hf_weights, params, streaming, transformer
from opd_jax.run import train

streaming.BLOCK_BYTES = {limit}
read = 0

class Counting:
    def __init__(self, view):
        self.view = view

    def __getattr__(self, name):
        return getattr(self.view, name)

    def __getitem__(self, index):
        global read
        values = self.view[index]
        read += values.nbytes
        return values

of_name = hf_weights.Weights.slice
hf_weights.Weights.slice = lambda self, name: Counting(of_name(self, name))

def load(run, workdir, **_):
    grid = mesh.make(run.mesh.data, run.mesh.fsdp, run.mesh.model)
    _, tree = hf.load(run.student.path, mesh=grid)
    held = 0
    for leaf in jax.tree.leaves(tree):
        parts = {{str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}}
        held += sum(parts.values())
    sizes = jax.tree.map(lambda x: x.nbytes, tree)
    print("READ", jax.process_index(), read, held, sum(jax.tree.leaves(sizes)))
    return {{"is_finished": True}}

train.train = load
"""


@pytest.mark.parametrize(
    ("name", "limit"), [("qwen3_untied_sharded", 1), ("qwen3_moe_untied_mixed_sharded", 2_000)]
)
def test_a_process_reads_only_what_its_devices_hold(tmp_path, name, limit):
    (tmp_path / "config.py").write_text(
        "from opd_jax import config\n\n\ndef get_config(arg=''):\n    c = config.defaults()\n"
        f"    c.student.path = c.teacher.path = {str(GOLDENS / name)!r}\n"
        "    c.data.prompts = 'unused'\n    return c\n"
    )
    # The axes go over the processes in turn, so that each holds another half of most weights.
    layout = Layout("wide", 4, {"data": 1, "fsdp": 4, "model": 2}, processes=2)
    argv = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path}", *layout.flags]
    results = layouts.finish(layouts.start(layout, argv, COUNTED.format(limit=limit)))
    assert [status for status, _ in results] == [0, 0], results
    for index, (_, text) in enumerate(results):
        who, read, held, size = map(int, re.search(r"READ (\d) (\d+) (\d+) (\d+)", text).groups())
        assert who == index
        assert read == held  # all of it, and nothing twice
        assert held < 0.7 * size


# --- before anything is placed --------------------------------------------------------------------


def _without_a_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    return "missing are: model-00002-of-00003.safetensors"


def _without_a_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = sorted({*index["weight_map"].values()})[-1]
    (folder / last).unlink()
    kept = {name: file for name, file in index["weight_map"].items() if file != last}
    path.write_text(json.dumps(index | {"weight_map": kept}))
    return r"missing tensors: \S+"


def _cut_short(folder):
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model-00003-of-00003.safetensors cannot be read as safetensors"


@pytest.mark.parametrize("damage", [_without_a_shard, _without_a_tensor, _cut_short])
@pytest.mark.parametrize("case", CASES[:2])
def test_a_damaged_folder_is_told_of_before_anything_is_placed(tmp_path, monkeypatch, case, damage):
    cfg, tree = hf.load(GOLDENS / case)
    size = sum(x.nbytes for x in jax.tree.leaves(tree))
    hf.save(tmp_path / "model", cfg, tree, max_shard_bytes=size // 2)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    words = damage(tmp_path / "model")
    monkeypatch.setattr(streaming, "written", lambda *_: pytest.fail("placed before it was told"))
    for grid in (None, mesh.make(data=2, fsdp=2, model=2)):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            hf.load(tmp_path / "model", mesh=grid)
