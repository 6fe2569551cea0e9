"""A step of adapters: the numbers of an independent one, of the adapters alone, on any mesh."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_steps import BATCH, CFG, GRID, STUDENT, STUDENT_0, TEACHER, TEACHER_0, TX, agree

from opd_jax import kl, mesh, optim, steps
from opd_jax.models import lora, params, transformer
from opd_jax.models.architecture import NUM_INPUTS
from opd_jax.models.lora import LoraSpec
from opd_jax.objective import ObjectiveConfig
from opd_jax.rock import RockConfig

SPEC = LoraSpec(rank=3, alpha=2.0)
PLAIN = dataclasses.replace(CFG, rock=RockConfig())  # no gate: the loss is the mean divergence
ADAM = optim.make(optim.OptimSpec("adamw", lr=0.01, weight_decay=0.1, warmup=0.0, clip=0.5))


def pairs(spec=SPEC, seed=5):
    """Adapters whose B is not 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        lora.specs(STUDENT, spec),
    )


def fresh(cfg=PLAIN, tx=TX, spec=SPEC, adapters=None, dtype=jnp.float32):
    base = jax.tree.map(lambda x: jnp.array(x, dtype), STUDENT_0)
    own = jax.tree.map(jnp.array, pairs(spec) if adapters is None else adapters)
    return steps.init(lora.attached(base, own, spec), jax.random.key(3), cfg=cfg, tx=tx)


def merged_by_hand(own, spec):
    layers = dict(STUDENT_0["layers"])
    for name, pair in own["layers"].items():
        num, letters = NUM_INPUTS[name], "ijkm"
        left, right = letters[:num], "xyz"[: layers[name].ndim - 1 - num]
        change = jnp.einsum(f"l{left}r,lr{right}->l{left}{right}", pair["a"], pair["b"])
        layers[name] = layers[name] + spec.scale * change
    return {**STUDENT_0, "layers": layers}


def dense_loss(tree, cfg=PLAIN):
    """Mean forward KL of the scored positions from whole logits, in f32, by another way."""
    valid = np.arange(BATCH.ids_BT.shape[1]) >= BATCH.start_B[:, None]
    real = cfg.kl.vocab_size
    ours, theirs = (
        jax.nn.log_softmax(
            transformer.logits(x, BATCH.ids_BT, cfg=part, valid_BT=valid)[:, :-1, :real]
        )
        for x, part in ((tree, STUDENT), (TEACHER_0, TEACHER))
    )
    kl_BT = jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)
    mask = BATCH.mask_BT[:, 1:]
    return jnp.sum(kl_BT * mask) / mask.sum()


@pytest.fixture(scope="module")
def teacher():
    return jax.tree.map(jnp.asarray, TEACHER_0)


def test_a_step_is_that_of_the_merged_weights_gradient(teacher):
    """Gradients of A and B by the chain rule from that of the merged weight; AdamW by optax."""
    own = pairs()
    grads = jax.jit(jax.grad(dense_loss))(merged_by_hand(own, SPEC))["layers"]
    chained = {}
    for name, pair in own["layers"].items():
        num = NUM_INPUTS[name]
        layers = []
        for dw, a, b in zip(*map(np.float64, (grads[name], pair["a"], pair["b"])), strict=True):
            flat = dw.reshape(int(np.prod(dw.shape[:num])), -1)
            da = SPEC.scale * flat @ b.reshape(SPEC.rank, -1).T
            db = SPEC.scale * a.reshape(-1, SPEC.rank).T @ flat
            layers.append((da.reshape(a.shape), db.reshape(b.shape)))
        chained[name] = {
            "a": np.stack([x for x, _ in layers]),
            "b": np.stack([x for _, x in layers]),
        }
    wanted = {"layers": jax.tree.map(np.float32, chained)}
    rule = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(optim.schedule(optim.OptimSpec(lr=0.01, warmup=0.0)), 0.9, 0.98, 1e-8,
                    weight_decay=0.1),
    )  # fmt: skip
    updates, _ = rule.update(wanted, rule.init(own), own)
    expected = optax.apply_updates(own, updates)
    state, metrics = steps.distill_step(fresh(tx=ADAM), teacher, BATCH, cfg=PLAIN, tx=ADAM)
    agree(mesh.to_host(lora.trained(state.params)), expected, 1e-4)
    assert metrics["grad_norm"].value() == pytest.approx(float(optax.tree.norm(wanted)), rel=1e-4)
    # Of plain descent what moves is the gradient itself.
    state, _ = steps.distill_step(fresh(), teacher, BATCH, cfg=PLAIN, tx=TX)
    agree(
        mesh.to_host(lora.trained(state.params)),
        jax.tree.map(lambda x, g: x - 0.3 * g, own, wanted),
        2e-5,
    )


def test_adapters_of_full_rank_move_a_weight_along_its_whole_gradient(teacher):
    """With A the identity B alone moves the merged weight: by the gradient of full training."""
    spec = LoraSpec(rank=8, alpha=8.0, targets="up_proj")
    eye = np.broadcast_to(np.eye(8, dtype=np.float32), (2, 8, 8)).copy()
    zero = np.zeros((2, 8, STUDENT.ffn), np.float32)
    state = fresh(spec=spec, adapters={"layers": {"up": {"a": eye, "b": zero}}})
    state, _ = steps.distill_step(state, teacher, BATCH, cfg=PLAIN, tx=TX)
    full = steps.init(jax.tree.map(jnp.array, STUDENT_0), jax.random.key(3), cfg=PLAIN, tx=TX)
    full, _ = steps.distill_step(full, teacher, BATCH, cfg=PLAIN, tx=TX)
    moved = full.params["layers"]["up"] - STUDENT_0["layers"]["up"]
    assert np.abs(moved).max() > 1e-3
    agree(np.asarray(state.params["layers"]["up"].b), np.asarray(moved), 1e-6)


def test_nothing_of_the_base_changes_and_nothing_else_has_a_state(teacher):
    state = fresh(CFG, ADAM)
    for leaf in jax.tree.leaves(state.opt):
        assert leaf.shape == () or SPEC.rank in leaf.shape
    assert steps.leaf_names(state.params)[:2] == ["layers/down/a", "layers/down/b"]
    assert len(steps.leaf_names(state.params)) == 14
    for _ in range(3):
        state, metrics = steps.distill_step(state, teacher, BATCH, cfg=CFG, tx=ADAM)
    assert "rounded_share" not in metrics
    host = mesh.to_host(state.params)
    for name, w in STUDENT_0["layers"].items():
        kept = host["layers"][name]
        np.testing.assert_array_equal(kept.w if hasattr(kept, "w") else kept, w, err_msg=name)
    for name in ("embed", "final_norm"):
        np.testing.assert_array_equal(host[name], STUDENT_0[name])
    own, before = lora.trained(host)["layers"], pairs()["layers"]
    for name, pair in own.items():
        for side in ("a", "b"):
            assert np.abs(pair[side] - before[name][side]).max() > 1e-4, (name, side)


def test_a_gradient_that_is_not_finite_is_told_by_its_adapter(teacher):
    own = pairs()
    own["layers"]["gate"]["b"][0, 0, 0] = np.nan
    state = fresh(adapters=own)
    names = steps.leaf_names(state.params)
    _, metrics = steps.distill_step(state, teacher, BATCH, cfg=PLAIN, tx=TX)
    assert names[int(metrics["nonfinite"].value())].startswith("layers/")


def test_a_frozen_base_may_have_16_bits_and_the_adapters_have_32(teacher):
    state, metrics = steps.distill_step(fresh(dtype=jnp.bfloat16), teacher, BATCH, cfg=PLAIN, tx=TX)
    assert "rounded_share" not in metrics
    assert state.params["layers"]["q"].w.dtype == state.params["embed"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.trained(state.params))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("sizes", [{"data": 1}, GRID], ids=str)
def test_no_mesh_and_no_split_changes_the_step(teacher, sizes, pieces):
    expected, _ = steps.distill_step(fresh(), teacher, BATCH, cfg=PLAIN, tx=TX)
    expected = mesh.to_host(lora.trained(expected.params))
    cfg = dataclasses.replace(PLAIN, microbatches=pieces if sizes == GRID else 4)
    devices = mesh.make(**sizes, devices=jax.devices()[: int(np.prod([*sizes.values()]))])

    def put(tree, declared):
        return jax.device_put(tree, params.shardings(declared, devices))

    with jax.set_mesh(devices):
        base = put(STUDENT_0, transformer.specs(STUDENT))
        own = put(pairs(), lora.specs(STUDENT, SPEC))
        init = jax.jit(lambda tree: steps.init(tree, jax.random.key(3), cfg=cfg, tx=TX))
        state = init(lora.attached(base, own, SPEC))
        state, _ = steps.distill_step(
            state,
            put(TEACHER_0, transformer.specs(TEACHER)),
            mesh.to_global(BATCH, devices),
            cfg=cfg,
            tx=TX,
        )
        for leaf, spec in zip(
            jax.tree.leaves(lora.trained(state.params)),
            jax.tree.leaves(lora.specs(STUDENT, SPEC)),
            strict=True,
        ):
            assert leaf.sharding.spec == jax.P(*spec.axes)
    agree(mesh.to_host(lora.trained(state.params)), expected)


WIDE = dataclasses.replace(STUDENT, width=160, ffn=512, vocab_size=2048, num_layers=4, head_dim=32)


def compiled(spec):
    """The update of a wider student, whole or with adapters, and bytes of what it is made of."""
    cfg = ObjectiveConfig(WIDE, WIDE, dataclasses.replace(CFG.kl, vocab_size=2048))
    tree = params.abstract(transformer.specs(WIDE), jnp.float32)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(tree))
    if spec is not None:
        own = params.abstract(lora.specs(WIDE, spec), jnp.float32)
        tree = lora.attached(tree, own, spec)
    make = lambda tree, key: steps.init(tree, key, cfg=cfg, tx=ADAM)  # noqa: E731
    state = jax.eval_shape(make, tree, jax.eval_shape(jax.random.key, 0))
    teacher = params.abstract(transformer.specs(WIDE), jnp.float32)
    states = jax.ShapeDtypeStruct((*BATCH.ids_BT[:, 1:].shape, WIDE.width), jnp.float32)
    traced = steps.distill_step.trace(
        state, teacher, jax.eval_shape(lambda: BATCH), cfg=cfg, tx=ADAM, states_BTE=states
    )
    return traced, whole


def made(jaxpr):
    """(primitive, shape) of every value that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        inner = list(jax.extend.core.jaxprs_in_params(equation.params))
        for one in inner:
            yield from made(one)
        if not inner:
            yield from ((equation.primitive.name, var.aval.shape) for var in equation.outvars)


def test_no_array_of_a_weights_size_is_made():
    """Neither a gradient nor a copy: of one layer's weight, of the stack, or of the vocabulary."""
    large = {(2048, 160), (160, 512), (512, 160), (4, 160, 512), (4, 512, 160)}
    found = []
    for spec in (SPEC, None):
        traced, _ = compiled(spec)
        found.append({x for name, x in made(traced.jaxpr.jaxpr) if name != "stop_gradient"})
    assert found[0] & large == set()
    assert found[1] & large == large


def test_an_update_of_adapters_takes_less_memory():
    small, whole = compiled(SPEC)
    large, _ = compiled(None)
    taken = []
    for traced in (small, large):
        stats = traced.lower().compile().memory_analysis()
        taken.append(
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
            + stats.temp_size_in_bytes
        )
    # Full training holds weights and two moments of a student, its gradient, and the teacher.
    assert taken[1] > 4.5 * whole
    assert taken[0] < taken[1] - 2.5 * whole


@pytest.mark.optimized
def test_the_gradient_of_a_head_is_formed_where_it_is_asked_for():
    hs_BTD, head_VD = jnp.ones((2, 4, 8)), jnp.asarray(STUDENT_0["embed"])
    ids_BT, weight_BT = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4))

    def loss(hs_BTD, head_VD):
        teacher_VE = jnp.asarray(TEACHER_0["head"][:, :8])
        return kl.weighted_kl(
            hs_BTD, head_VD, hs_BTD, teacher_VE, weight_BT, spec=CFG.kl, labels_BT=ids_BT
        )[0]

    both, alone = jax.grad(loss, (0, 1)), jax.grad(loss)
    shapes = [
        {shape for _, shape in made(jax.make_jaxpr(f)(hs_BTD, head_VD).jaxpr)}
        for f in (both, alone)
    ]
    assert [head_VD.shape in found for found in shapes] == [True, False]
    np.testing.assert_array_equal(both(hs_BTD, head_VD)[0], alone(hs_BTD, head_VD))
