"""The three programs of a step, compiled ahead of time for a TPU topology: they build and fit.

Nothing runs: libtpu compiles on any machine. Widths are small and the vocabulary is a real one, so
what would go wrong at scale (a gathered logits array, a copied cache) stands out in bytes.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import kl, optim, steps
from opd_jax import mesh as meshlib
from opd_jax.kl import KLSpec
from opd_jax.models import attention, kernels, kv_cache, paged, params, transformer
from opd_jax.models.architecture import Experts, LayerKind
from opd_jax.models.attention import Span
from opd_jax.objective import ObjectiveConfig
from opd_jax.pytrees import Prompt, Rollout
from opd_jax.rock import RockConfig
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

pytestmark = [pytest.mark.ci, pytest.mark.optimized]

TOPOLOGY, AXES = "v5e:2x4", {"data": 2, "fsdp": 2, "model": 2}
VOCAB, REAL_IDS = 151_936, 151_669  # of Qwen3: padded, and with a token
LOCAL_VOCAB = VOCAB // AXES["model"]
ROWS, PROMPT, NEW = 128, 128, 128
STUDENT = transformer.ModelConfig(
    model_type="qwen3",
    vocab_size=VOCAB,
    width=256,
    ffn=768,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    qk_norm=True,
    tied=True,
    dtype="bfloat16",
    remat="full",
)
TEACHER = dataclasses.replace(STUDENT, width=512, num_heads=8)
COLLECTIVE = re.compile(
    r"(?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


@pytest.fixture(scope="module")
def mesh():
    """A mesh of described devices; libtpu must not look for a machine around it, nor lock one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
        devices = np.array(described.devices).reshape(tuple(AXES.values()))
        yield Mesh(devices, tuple(AXES), axis_types=(AxisType.Explicit,) * 3)


class Shapes:
    """The arguments of the programs, as shapes placed on the mesh."""

    def __init__(self, mesh):
        self.mesh = mesh
        self.cfg = ObjectiveConfig(
            student=STUDENT,
            teacher=TEACHER,
            kl=KLSpec(vocab_size=REAL_IDS),
            rock=RockConfig(mode="ema"),
        )
        self.tx = optim.make(optim.OptimSpec())
        student = params.abstract(transformer.specs(STUDENT), jnp.float32, mesh)
        self.teacher = params.abstract(transformer.specs(TEACHER), jnp.bfloat16, mesh)
        self.key = jax.eval_shape(lambda: jax.random.key(0))
        self.state = jax.eval_shape(
            functools.partial(steps.init, cfg=self.cfg, tx=self.tx), student, self.key
        )

    def array(self, shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, P(*spec)))

    def rows(self, dtype, *rest, num=ROWS):
        spec = (meshlib.BATCH, *[None] * len(rest))
        return self.array((num, *rest), dtype, *spec)

    def rollout(self):
        width = PROMPT + NEW
        return Rollout(
            ids_BT=self.rows(jnp.int32, width),
            start_B=self.rows(jnp.int32),
            mask_BT=self.rows(bool, width),
            logp_BT=self.rows(jnp.float32, width),
            truncated_B=self.rows(bool),
            policy_step=self.array((), jnp.int32),
        )


@pytest.fixture(scope="module")
def uncached():
    """Compile afresh: what the cache holds for a TPU can only be read where there is one."""
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", was)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def compiled(mesh, uncached):
    """name -> the compiled program."""
    with jax.set_mesh(mesh):
        assert meshlib.platform() == "tpu"  # the rules for a TPU are the ones compiled
        shapes = Shapes(mesh)
        answers = shapes.rollout()
        states = shapes.rows(jnp.bfloat16, PROMPT + NEW - 1, TEACHER.width)
        prompt = Prompt(shapes.rows(jnp.int32, PROMPT, num=8), shapes.rows(jnp.int32, num=8))
        lowered = {
            "teacher": steps.teacher_states.lower(shapes.teacher, answers, cfg=shapes.cfg),
            "update": steps.distill_step.lower(
                shapes.state,
                shapes.teacher,
                answers,
                cfg=shapes.cfg,
                tx=shapes.tx,
                states_BTE=states,
            ),
            "sample": decode._sample.lower(
                shapes.state.params,
                prompt,
                shapes.key,
                None,
                shapes.array((), jnp.int32),
                None,
                cfg=STUDENT,
                sampler=Sampler(vocab_size=REAL_IDS),
                max_new=NEW,
                samples=ROWS // 8,
            ),
        }
        return {name: low.compile() for name, low in lowered.items()}


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """Array shapes named in a piece of HLO."""
    found = re.findall(r"\b(?:f32|bf16|s32|u32|pred|f16)\[([0-9,]*)\]", text)
    return [tuple(int(n) for n in dims.split(",") if n) for dims in found]


def vocabulary_shapes(program) -> list[tuple[int, ...]]:
    """Shapes with a vocabulary axis, whole or one chip's part, that its collectives carry."""
    lines = [line for line in program.as_text().splitlines() if COLLECTIVE.search(line)]
    return [s for line in lines for s in shapes_in(line) if {VOCAB, LOCAL_VOCAB} & set(s)]


def test_heads_travel_and_logits_do_not(compiled):
    widths = {1, *(w // part for w in (STUDENT.width, TEACHER.width) for part in (1, 2))}
    travelling = vocabulary_shapes(compiled["update"]) + vocabulary_shapes(compiled["teacher"])
    assert travelling  # the heads over fsdp, and the gradient of the student's
    assert [s for s in travelling if set(s) - {VOCAB, LOCAL_VOCAB} - widths] == []


def test_a_draw_exchanges_no_logits(compiled):
    """What travels with a side of the vocabulary is the head; of logits only blocks of them do."""
    widths = {1, STUDENT.width, STUDENT.width // 2}
    travelling = vocabulary_shapes(compiled["sample"])
    assert travelling
    assert [s for s in travelling if set(s) - {VOCAB, LOCAL_VOCAB} - widths] == []


def test_what_a_chip_needs_beyond_its_arguments_is_less_than_the_dense_logits(compiled):
    positions = ROWS * (PROMPT + NEW - 1) // (AXES["data"] * AXES["fsdp"])
    dense = 2 * positions * LOCAL_VOCAB * 4  # student and teacher, f32
    temporaries = {n: p.memory_analysis().temp_size_in_bytes for n, p in compiled.items()}
    assert temporaries["update"] < dense / 4, (temporaries, dense)
    assert temporaries["teacher"] < dense / 16, (temporaries, dense)
    assert temporaries["sample"] < dense / 8, (temporaries, dense)


def test_the_teacher_goes_through_its_layers_once(compiled):
    """The compiler counts a loop's body once, so that a second loop doubles what it counts."""
    text = compiled["teacher"].as_text()
    assert len(re.findall(r" while\(", text)) == 1
    rows = ROWS // (AXES["data"] * AXES["fsdp"])
    layer = jax.tree.leaves(transformer.specs(TEACHER)["layers"])
    weights = sum(np.prod(spec.shape[1:]) for spec in layer) / AXES["model"]
    products = 2 * rows * (PROMPT + NEW - 1) * weights
    assert products < compiled["teacher"].cost_analysis()["flops"] < 1.5 * products


def test_the_state_is_updated_in_place(compiled):
    memory = compiled["update"].memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes


def test_the_cache_is_written_in_place(compiled):
    rows = ROWS // (AXES["data"] * AXES["fsdp"])
    text = compiled["sample"].as_text()
    heads = STUDENT.num_kv_heads // AXES["model"]
    size = rows * (PROMPT + NEW) * heads * STUDENT.head_dim  # keys or values of a layer
    assert any(size == int(np.prod(shape)) for shape in shapes_in(text))
    in_loop = [
        line
        for body in re.findall(r"\n%?\S*body\S* [^\n]*\{\n(.*?)\n\}", text, re.DOTALL)
        for line in body.splitlines()
        if re.search(r"= \S+ copy\(", line)
    ]
    copied = [line for line in in_loop if size in [int(np.prod(s)) for s in shapes_in(line)]]
    assert copied == []


@pytest.fixture
def array(mesh, uncached):
    """Makes arguments that lie on one chip."""
    one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    return lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=one)


def test_the_gradient_of_attention_holds_a_block_of_scores_at_a_time(array):
    heads, groups, width, length = 8, 4, 128, 4096
    q = array(jnp.bfloat16, 1, length, heads, groups, width)
    kv = array(jnp.bfloat16, 1, length, heads, width)
    total = lambda *inputs: jnp.sum(attention.causal(*inputs), dtype=jnp.float32)  # noqa: E731
    grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    program = grad.lower(q, kv, kv, array(bool, 1, length)).compile()
    block = 4 * heads * groups * 512 * length  # f32, the last and largest
    assert program.memory_analysis().temp_size_in_bytes < 2 * block  # of 8, in f32 and bf16


@pytest.mark.parametrize(("head_dim", "window"), [(128, None), (64, 1024)])
def test_the_kernel_of_attention_holds_no_scores(array, head_dim, window):
    """Queries, keys and values of whole blocks are laid out anew, and that is all."""
    heads, groups, length = 8, 4, 4096
    q = array(jnp.bfloat16, 1, length, heads, groups, head_dim)
    kv = array(jnp.bfloat16, 1, length, heads, head_dim)
    mix = functools.partial(kernels.causal, span=Span(0.1, window), name="splash")
    total = lambda *inputs: jnp.sum(mix(*inputs), dtype=jnp.float32)  # noqa: E731
    grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    program = grad.lower(q, kv, kv, array(bool, 1, length)).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3  # out; dq; dk, dv
    queries = 2 * heads * groups * length * max(head_dim, 128)  # in registers, in bf16
    assert program.memory_analysis().temp_size_in_bytes < 12 * queries
    assert 12 * queries < heads * groups * length**2  # a quarter of the scores in f32


def test_a_long_cache_is_read_in_blocks_that_are_no_copies(mesh, uncached):
    rows, heads, groups, width, slots = 256, 4, 4, 128, 6144

    def lies(dtype, *shape, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    held = P(*kv_cache.AXES)
    with jax.set_mesh(mesh):
        assert kv_cache.block(slots) == 2048
        program = (
            jax.jit(functools.partial(kernels.cached, scale=0.1))
            .lower(
                lies(jnp.bfloat16, rows, 1, heads, groups, width, spec=kernels._HEADS),
                lies(jnp.bfloat16, rows, heads, width, slots, spec=held),
                lies(jnp.bfloat16, rows, heads, slots, width, spec=held),
                lies(bool, rows, 1, slots, spec=P(meshlib.BATCH, None, None)),
            )
            .compile()
        )
    text = program.as_text()
    assert " while(" in text
    assert not COLLECTIVE.search(text)
    block = 2 * rows * heads * width * 2048 // np.prod(list(AXES.values()))  # keys, on a chip
    assert program.memory_analysis().temp_size_in_bytes < block


@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_a_cache_in_pages_is_written_in_place_and_never_copied(mesh, uncached, group):
    """One token after the other, by two kernels and no collective."""
    rows, heads, width, slots = 64, 4, 128, 4096

    def lies(dtype, *shape, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def answer(k, v, token, length_B):
        def step(carry):
            k, v, q, length_B = carry
            new = q[:, :, :, 0]
            k, v = paged.write(k, v, new, new, length_B)
            return k, v, q + paged.attend(q, k, v, length_B + 1, 0.1), length_B + 1

        return jax.lax.while_loop(
            lambda carry: jnp.all(carry[3] < slots), step, (k, v, token, length_B)
        )

    held = [lies(jnp.bfloat16, rows, heads, slots, width, spec=paged.HELD)] * 2
    with jax.set_mesh(mesh):
        program = (
            jax.jit(answer, donate_argnums=(0, 1))
            .lower(
                *held,
                lies(jnp.bfloat16, rows, 1, heads, group, width, spec=paged._HEADS),
                lies(jnp.int32, rows, spec=P(meshlib.BATCH)),
            )
            .compile()
        )
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert " while(" in text
    assert len(COLLECTIVE.findall(text)) <= 1  # whether any row goes on
    cache = 2 * rows * heads * slots * width // np.prod(list(AXES.values()))  # keys, on a chip
    needs = program.memory_analysis()
    assert needs.alias_size_in_bytes >= 2 * cache
    assert needs.temp_size_in_bytes < cache / 20


@pytest.mark.parametrize("slots", [0, 32], ids=["in step", "slots"])
def test_long_answers_are_sampled_in_pages(mesh, uncached, slots):
    """The whole rollout: a kernel to write and one to read in each layer, and no second cache."""
    rows, new = 64, 4096
    with jax.set_mesh(mesh):
        shapes = Shapes(mesh)
        prompt = Prompt(shapes.rows(jnp.int32, PROMPT, num=rows), shapes.rows(jnp.int32, num=rows))
        program = decode._sample.lower(
            shapes.state.params,
            prompt,
            shapes.key,
            None,
            shapes.array((), jnp.int32),
            None,
            cfg=STUDENT,
            sampler=Sampler(vocab_size=REAL_IDS),
            max_new=new,
            samples=1,
            slots=slots,
        ).compile()
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * STUDENT.num_layers
    held = (slots or rows) // (AXES["data"] * AXES["fsdp"])
    size = paged.whole(PROMPT + new)
    heads = STUDENT.num_kv_heads // AXES["model"]
    cache = 2 * STUDENT.num_layers * 2 * held * heads * size * STUDENT.head_dim  # on a chip
    weights = 2 * sum(np.prod(x.shape) for x in jax.tree.leaves(shapes.state.params))
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert cache <= temporaries < 1.5 * cache + weights, (temporaries / cache, weights / cache)


def test_two_cores_that_work_as_one_share_the_rows(uncached):
    """A v5p has such; each row and head is read by one of them."""
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    devices = np.array(described.devices).reshape(1, 2, 2)
    pair = Mesh(devices, tuple(AXES), axis_types=(AxisType.Explicit,) * 3)

    def lies(dtype, *shape, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(pair, spec))

    with jax.set_mesh(pair):
        assert meshlib.cores() == 2
        held = lies(jnp.bfloat16, 8, 4, 2048, 128, spec=paged.HELD)
        traced = jax.jit(functools.partial(paged.attend, scale=0.1)).trace(
            lies(jnp.bfloat16, 8, 1, 4, 4, 128, spec=paged._HEADS),
            held,
            held,
            lies(jnp.int32, 8, spec=P(meshlib.BATCH)),
        )
        assert "grid=(2, 4, 1)" in str(traced.jaxpr)
        traced.lower().compile()


def cycles(text: str) -> int:
    """What the compiler thinks a piece of its program takes."""
    return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))


def test_the_kl_of_a_chunk_takes_little_longer_than_its_products(array):
    side, width = 8192, 2048  # a square product, at the peak rate; a Qwen3 1.7B
    square = array(jnp.bfloat16, side, side)
    peak = jax.jit(jnp.matmul).lower(square, square).compile().as_text()
    flops_per_cycle = 2 * side**3 / cycles(peak)

    # The rule for a chunk's size asks the mesh, or else the default device, where it will run.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshlib, "platform", lambda: "tpu")
        chunk = kl.auto_chunk(VOCAB)

        def loss(hs, ws, ht, wt, weight):
            return kl.weighted_kl(hs, ws, ht, wt, weight, spec=KLSpec(vocab_size=REAL_IDS))[0]

        states, head = (array(jnp.bfloat16, *s) for s in ((1, 4096, width), (VOCAB, width)))
        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        weight = array(jnp.float32, 1, 4096)
        text = grad.lower(states, head, states, head, weight).compile().as_text()
    (loop,) = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    body = text.split(f"\n%{loop} (")[1].split("\n}")[0]
    products = 4 * 2 * chunk * VOCAB * width / flops_per_cycle
    assert products < cycles(body) < 1.8 * products


# --- experts --------------------------------------------------------------------------------------

SPARSE = dataclasses.replace(
    TEACHER,
    model_type="qwen3_moe",
    experts=Experts(num=32, top_k=4, ffn=256),
    pattern=(LayerKind(is_sparse=True),) * TEACHER.num_layers,
)
TOKENS = ROWS * PROMPT // (AXES["data"] * AXES["fsdp"])  # of a chip


@pytest.fixture(scope="module")
def sparse(mesh, uncached):
    """name -> the compiled pass through a model with experts."""

    def states(tree, ids, valid):
        return transformer.hidden(tree, ids, transformer.positions(valid), valid, cfg=SPARSE)[0]

    def gradient(*inputs):
        return jax.grad(lambda *args: jnp.sum(states(*args), dtype=jnp.float32))(*inputs)

    with jax.set_mesh(mesh):
        shapes = Shapes(mesh)
        tree = params.abstract(transformer.specs(SPARSE), jnp.bfloat16, mesh)
        inputs = tree, shapes.rows(jnp.int32, PROMPT), shapes.rows(bool, PROMPT)
        return {f.__name__: jax.jit(f).lower(*inputs).compile() for f in (states, gradient)}


def test_experts_exchange_one_sum_of_states_and_no_pairs(sparse):
    pairs = TOKENS * SPARSE.experts.top_k
    text = sparse["states"].as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3  # the kernel of ragged_dot
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    travelling = [shape for line in lines for shape in shapes_in(line)]
    assert (TOKENS, SPARSE.width) in travelling
    assert [shape for shape in travelling if pairs in shape] == []


def test_no_expert_computes_all_tokens_not_in_the_gradient_either(sparse):
    """A gradient of ragged_dot itself would multiply all pairs by all experts."""
    flops = {name: program.cost_analysis()["flops"] for name, program in sparse.items()}
    assert flops["gradient"] < 4 * flops["states"]  # again, and once for either factor
    pairs, num = TOKENS * SPARSE.experts.top_k, SPARSE.experts.num // AXES["model"]
    dense = 2 * num * pairs * SPARSE.width
    assert all(p.memory_analysis().temp_size_in_bytes < dense / 2 for p in sparse.values())
