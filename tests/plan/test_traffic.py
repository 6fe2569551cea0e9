"""What is read from the text of compiled programs: rounds, bytes and collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import mesh, rounds
from opd_jax.plan import chips, hlo, traffic

AXES = {"data": 2, "fsdp": 2, "model": 2}


def program(function, *args):
    with chips.afresh():  # names of operations are no part of the cache's key
        return hlo.read(jax.jit(function).lower(*args).compile().as_text())


def moved(function, *args):
    read = program(function, *args)
    assert read.uncounted() == 0
    return traffic.traffic(read.runs(), read).num_bytes


def test_a_product_reads_its_factors_and_writes_its_result():
    a, b = jnp.ones((300, 200)), jnp.ones((200, 500))
    assert moved(jnp.matmul, a, b) == 4 * (300 * 200 + 200 * 500 + 300 * 500)


@pytest.mark.parametrize("length", [3, 12])
def test_a_loop_over_stacked_weights_reads_each_once(length):
    x, w = jnp.ones((8, 128)), jnp.ones((length, 128, 128))

    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    weights = 4 * w.size
    assert weights < moved(function, x, w) < 4 * weights  # sliced out, and read; never all of them


def test_a_buffer_that_is_written_row_by_row_moves_once():
    def function(x):
        return jax.lax.scan(lambda s, x: (s + jnp.sum(x), jnp.tanh(x)), 0.0, x)

    x = jnp.ones((512, 256))
    assert 2 * 4 * x.size <= moved(function, x) < 8 * 4 * x.size  # of 512 times as much


def test_rounds_stand_in_the_name_of_a_loop_or_in_its_counter():
    def function(x):
        with rounds.expected(11):
            x = jax.lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: jnp.cumsum(jnp.sin(x)), x)
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.cumsum(jnp.cos(x)), x)

    read = program(function, jnp.ones(64))
    assert read.uncounted() == 0
    assert {(11, True), (5, False)} <= {(n, is_open) for _, _, n, is_open in read.runs()}
    unnamed = program(
        lambda x: jax.lax.while_loop(lambda x: jnp.max(x) < 9, jnp.sin, x), jnp.ones(64)
    )
    assert unnamed.uncounted() == 1


def test_a_loop_over_what_a_cache_holds_goes_round_as_often_as_it_does_on_average():
    begin, new, size, blocks = 800, 8192, 2304, 4
    mean = np.mean([-(-(begin + t) // size) for t in range(1, new + 1)])

    def function(x, n):
        def token(carry):
            x, n = carry
            with rounds.filled(blocks, size * blocks):
                x = jax.lax.fori_loop(0, n % 3, lambda _, x: jnp.cumsum(jnp.cos(x)), x)
            return x, n + 1

        with rounds.expected(new, begin=begin):
            return jax.lax.while_loop(lambda carry: carry[1] < 9, token, (x, n))

    read = program(function, jnp.ones(64), 1)
    assert read.uncounted() == 0
    most = max(n for _, _, n, _ in read.runs())
    assert mean * new <= most < 1.03 * mean * new  # its places are a few more than its tokens
    assert rounds.of("a/filled_4_of_9216/while") == 2.5


def test_a_slice_in_a_fusion_of_a_fusion_counts_by_itself():
    text = """HloModule m, is_scheduled=true

%inner (p.0: bf16[64,9216], p.1: s32[]) -> bf16[64,2048] {
  %p.0 = bf16[64,9216]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[64,2048]{1,0} dynamic-slice(%p.0, %zero, %p.1), dynamic_slice_sizes={64,2048}
}

%outer (q.0: s32[], q.1: bf16[64,9216]) -> bf16[64,2048] {
  %q.0 = s32[] parameter(0)
  %q.1 = bf16[64,9216]{1,0} parameter(1)
  %sliced = bf16[64,2048]{1,0} fusion(%q.1, %q.0), kind=kLoop, calls=%inner
  ROOT %negated = bf16[64,2048]{1,0} negate(%sliced)
}

ENTRY %main (a: bf16[64,9216], b: s32[]) -> bf16[64,2048] {
  %a = bf16[64,9216]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %made = bf16[64,2048]{1,0} fusion(%b, %a), kind=kOutput, calls=%outer
}
"""
    read = hlo.read(text)
    moved = traffic.traffic(read.runs(), read).num_bytes
    assert moved == pytest.approx(2 * 2 * 64 * 2048, abs=8)  # and the place where it begins


@pytest.mark.parametrize(
    ("axes", "spec", "sent"),
    [
        (("model",), P("model", None), 1 / 2),
        (("fsdp",), P("fsdp", None), 1 / 2),
        (("data", "fsdp"), P(("data", "fsdp"), None), 3 / 4),
    ],
)
def test_a_gather_in_a_loop_is_told_by_axis_size_and_rounds(axes, spec, sent):
    devices = mesh.make(**AXES)
    with jax.set_mesh(devices):
        w = jax.device_put(jnp.ones((6, 64, 64)), NamedSharding(devices, P(None, *spec)))
        x = jax.device_put(jnp.ones((8, 64)), NamedSharding(devices, P()))

        def function(x, w):
            return jax.lax.scan(
                lambda x, w: (jnp.tanh(x @ mesh.constrain(w, None, None)), None), x, w
            )[0]

        read = program(function, x, w)
        (found,) = traffic.collectives(read.runs(), read, devices)
    assert (found.kind, found.axes, found.count) == ("all-gather", "+".join(axes), 6)
    assert (found.num_bytes, found.moved) == (4 * 64 * 64, 6 * 4 * 64 * 64 * sent)


def test_a_sum_over_devices_is_sent_twice():
    devices = mesh.make(**AXES)
    with jax.set_mesh(devices):
        x = jax.device_put(jnp.ones((8, 64)), NamedSharding(devices, P(None, "model")))
        w = jax.device_put(jnp.ones((64, 32)), NamedSharding(devices, P("model", None)))
        read = program(functools.partial(jnp.matmul, out_sharding=P(None, None)), x, w)
        (found,) = traffic.collectives(read.runs(), read, devices)
    assert (found.kind, found.axes, found.num_bytes) == ("all-reduce", "model", 4 * 8 * 32)
    assert found.moved == 2 * found.num_bytes / 2


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "model", 2),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, x", "data", 2),
        ("replica_groups=[4,2]<=[8]", "model", 2),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", "fsdp", 2),
        ("replica_groups={{0,3},{1,2},{4,7},{5,6}}", "?", 2),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", "fsdp", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "data+fsdp", 4),
        ("replica_groups=[1,8]<=[8]", "data+fsdp+model", 8),
        ("replica_groups={}", "data+fsdp+model", 8),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}, d", "fsdp", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", "model", 2),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}", "fsdp", 2),
    ],
)
def test_groups_of_devices_are_axes_in_every_spelling(groups, axes, size):
    assert traffic.axes_of(f"channel_id=1, {groups}, dimensions={{0}}", AXES) == (axes, size)


COMBINED = """
ENTRY %main (a: f32[4,8], b: f32[2,8]) -> f32[8,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[2,8]{1,0} parameter(1)
  %g = ((f32[4,8]{1,0}, f32[2,8]{1,0}), (f32[8,8]{1,0}, f32[4,8]{1,0})) all-gather-start(%a, %b), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %d = (f32[8,8]{1,0}, f32[4,8]{1,0}) all-gather-done(%g)
  %r = f32[2,8]{1,0} reduce-scatter(%a), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}
  %p = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=3, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  ROOT %o = f32[8,8]{1,0} get-tuple-element(%d), index=0
}
"""  # noqa: E501


def test_a_payload_is_the_larger_side_also_of_several_arrays_at_once():
    read = hlo.read(COMBINED)
    found = traffic.collectives(read.runs(), read, mesh.make(**AXES))
    assert {each.kind: each.num_bytes for each in found} == {
        "all-gather": 4 * (8 + 4) * 8,
        "reduce-scatter": 4 * 4 * 8,
        "collective-permute": 4 * 4 * 8,
    }
    assert {each.axes for each in found} == {"model"}


def test_what_stays_inside_a_chip_is_no_traffic_of_its_memory():
    inside, outside = hlo.arrays("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0:T(128)})")
    assert (inside.num_bytes, inside.in_memory) == (2 * 8 * 128, False)
    assert (outside.num_bytes, outside.in_memory) == (16, True)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no compiled program"):
        hlo.read("HloModule nothing\n")


def test_bytes_of_a_program_in_the_order_of_numpy():
    """Sizes of types are those of numpy."""
    for dtype in ("bool", "int8", "int32", "bfloat16", "float32"):
        read = program(lambda x: x + x, jnp.ones((3, 5), dtype))
        (root,) = [op for op in read.computations[read.entry].values() if op.is_root]
        assert root.arrays[0].num_bytes == 15 * np.dtype(jnp.dtype(dtype)).itemsize


PRINTED_OVER_LINES = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %tanh.1 = f32[8]{0} tanh(%p)
}, execution_thread="main"

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"about": "two lines
}}, metadata={op_name="jit(f)/visits_12/kernel"}
  ROOT %last = f32[8]{0} fusion(%kernel), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
}
"""  # noqa: E501


def test_what_comes_after_an_operation_printed_over_several_lines_is_read():
    """As a Pallas kernel is, whose own text has lines that begin as the end of a program does."""
    read = hlo.read(PRINTED_OVER_LINES)
    assert {name: [*ops] for name, ops in read.computations.items()} == {
        "fused": ["p", "tanh.1"],
        "main.1": ["x", "kernel", "last"],
    }
    assert read.computations["main.1"]["kernel"].op_name == "jit(f)/visits_12/kernel"
    found = traffic.traffic(read.runs(), read)
    assert (found.cycles, found.silent) == (70, 1)
    assert found.num_bytes == 4 * 32
    assert found.silent_bytes == 2 * 32


@pytest.mark.parametrize(
    ("scope", "share"),
    [
        ("kernel", 1),
        ("part_16_of_4096/kernel", 16 / 4096),
        ("begins_1024_rounds_3072/while/body/pages_4_of_4096/kernel", (4 * 5 / 8 + 0.5) / 4),
        ("pages_4_of_4096/jit(paged_attention)/kernel", (4 / 2 + 0.5) / 4),
    ],
)
def test_a_kernel_moves_what_it_touches_of_a_cache(scope, share):
    read = hlo.read(PRINTED_OVER_LINES.replace("visits_12/kernel", scope))
    found = traffic.traffic(read.runs(), read)
    assert found.silent_bytes == 2 * 32 * share
    assert found.num_bytes == 2 * 32 + found.silent_bytes


GIVEN_ON = """HloModule jit_f

%renamed (p: f32[16,8]) -> f32[8,16] {
  %p = f32[16,8]{1,0} parameter(0)
  ROOT %bitcast.1 = f32[8,16]{0,1} bitcast(%p)
}

%product (a: f32[16,8], b: f32[4,16]) -> f32[4,8] {
  %a = f32[16,8]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  %w = f32[8,16]{0,1} fusion(%a), kind=kLoop, calls=%renamed
  ROOT %convolution.1 = f32[4,8]{1,0} convolution(%b, %w), dim_labels=bf_oi->bf
}

%sliced (a: f32[16,8]) -> f32[8,2] {
  %a.1 = f32[16,8]{1,0} parameter(0)
  %w.1 = f32[8,16]{0,1} fusion(%a.1), kind=kLoop, calls=%renamed
  ROOT %slice.1 = f32[8,2]{0,1} slice(%w.1), slice={[0:8], [0:2]}
}

ENTRY %main (x: f32[16,8], y: f32[4,16]) -> f32[4,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %y = f32[4,16]{1,0} parameter(1)
  OPERATION
}
"""


@pytest.mark.parametrize(
    ("operation", "numbers"),
    [
        # A weight that a fusion in the fusion only names anew is read by the product behind it.
        ("ROOT %r = f32[4,8]{1,0} fusion(%x, %y), kind=kOutput, calls=%product", 128 + 64 + 32),
        ("ROOT %r = f32[8,2]{0,1} fusion(%x), kind=kLoop, calls=%sliced", 2 * 16),
        ("ROOT %r = f32[8,16]{0,1} fusion(%x), kind=kLoop, calls=%renamed", 2 * 128),  # a copy
        # A part that is brought into the chip's own memory, or elsewhere, while others work.
        (
            "ROOT %r = ((f32[16,8]{1,0}), f32[4,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), "
            "slice={[0:4], [0:8]}",
            32,
        ),
        (
            "ROOT %r = ((f32[16,8]{1,0}), f32[4,8]{1,0}, s32[]{:S(2)}) slice-start(%x), "
            "slice={[0:4], [0:8]}",
            2 * 32,
        ),
    ],
)
def test_what_is_named_anew_or_sliced_counts_where_it_is_read(operation, numbers):
    read = hlo.read(GIVEN_ON.replace("OPERATION", operation))
    assert traffic.traffic(read.runs(), read).num_bytes == 4 * numbers
