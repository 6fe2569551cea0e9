"""Adapters: a fresh one changes nothing, a trained one is its merged weight, in every family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import FOLDERS, GOLDENS, SPEC, fresh, grown

from opd_jax import mesh, pytrees
from opd_jax.models import arranged, hf, lora, params, peft, transformer
from opd_jax.models.architecture import NUM_INPUTS
from opd_jax.models.lora import LoraSpec
from opd_jax.models.transformer import ModelConfig
from opd_jax.rollout import decode
from opd_jax.rollout.sampling import Sampler

CFG = ModelConfig("qwen3", 32, 8, 16, 2, 4, 2, 4, tied=True, qk_norm=True)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
logits = jax.jit(transformer.logits, static_argnames="cfg")


def base(cfg=CFG, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: (spec.mean + rng.normal(0, 0.4, spec.shape)).astype(np.float32),
        transformer.specs(cfg),
    )


def by_hand(tree, spec=SPEC):
    """The merged parameters, weight by weight and layer by layer, in numpy's float64."""
    layers = dict(tree["layers"])
    for name, w in tree["layers"].items():
        if not hasattr(w, "a"):
            continue
        rows = []
        for old, a, b in zip(*map(np.asarray, (w.w, w.a, w.b)), strict=True):
            flat = np.float64(a).reshape(-1, spec.rank) @ np.float64(b).reshape(spec.rank, -1)
            rows.append(old + spec.alpha / spec.rank * flat.reshape(old.shape))
        layers[name] = np.stack(rows).astype(np.float32)
    return {**tree, "layers": layers}


IDS = np.random.default_rng(3).integers(0, 32, (4, 7)).astype(np.int32)
VALID = np.arange(7) >= np.array([0, 3, 1, 2])[:, None]


@pytest.mark.optimized
def test_fresh_adapters_are_the_base_bit_for_bit():
    tree = base()
    with_adapters = fresh(tree, CFG)
    plain = logits(tree, IDS, cfg=CFG, valid_BT=VALID)
    np.testing.assert_array_equal(logits(with_adapters, IDS, cfg=CFG, valid_BT=VALID), plain)
    merged = lora.merged(with_adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, merged, tree)


def test_a_fresh_a_has_the_variance_that_peft_draws_with():
    wide = dataclasses.replace(CFG, width=192, ffn=256)
    spec = LoraSpec(rank=64, targets="up_proj,down_proj")
    pairs = lora.init(wide, spec, jax.random.key(0))["layers"]
    assert not any(np.any(pair["b"]) for pair in pairs.values())
    assert np.std(pairs["up"]["a"]) == pytest.approx((3 * 192) ** -0.5, rel=0.05)
    assert np.std(pairs["down"]["a"]) == pytest.approx((3 * 256) ** -0.5, rel=0.05)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale(rslora):
    assert LoraSpec(rank=4, alpha=6.0, rslora=rslora).scale == (3.0 if rslora else 1.5)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_with_adapters_is_its_merged_model(name):
    cfg, tree = hf.load(GOLDENS / name)
    has_dense = not all(kind.is_sparse for kind in cfg.kinds)
    assert {*lora.targets(cfg, SPEC)} == {*PROJECTIONS[: 7 if has_dense else 4]}
    with_adapters = grown(tree, cfg)
    whole = by_hand(with_adapters)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        lora.merged(with_adapters),
        whole,
    )
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 7)).astype(np.int32)
    ours, expected, plain = (
        logits(x, ids, cfg=cfg, valid_BT=VALID) for x in (with_adapters, whole, tree)
    )
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["qwen3_moe_untied_mixed_sharded"])
def test_adapters_answer_as_their_merged_model_does(name):
    """Prefilled apart, then token by token merged, layers of either kind."""
    cfg, tree = hf.load(GOLDENS / name)
    with_adapters = grown(tree, cfg)
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 7)).astype(np.int32)
    prompt = pytrees.Prompt(ids, (~VALID).sum(1).astype(np.int32))
    sampler = Sampler(vocab_size=cfg.vocab_size, stop_ids=(1,), temperature=0.0)
    ours, expected = (
        decode.sample(x, prompt, jax.random.key(0), cfg=cfg, sampler=sampler, max_new=5)
        for x in (with_adapters, by_hand(with_adapters))
    )
    np.testing.assert_array_equal(ours.ids_BT, expected.ids_BT)


def test_in_16_bits_decoding_keeps_a_change_below_the_last_bit_of_its_weight():
    """Merged it would be rounded away, and what answers would not be what is trained."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    halved = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base())
    small = grown(halved, cfg, dataclasses.replace(SPEC, alpha=1e-4))
    layers = arranged.for_decoding(small, cfg=cfg)["layers"]
    q = layers[0]["q"]
    assert (q.w.w_OI.dtype, q.a.dtype, q.b.dtype) == (jnp.bfloat16,) * 3
    assert np.any(np.asarray(q.b, np.float32))
    merged = lora.merged(small, jnp.bfloat16)["layers"]["q"][0]
    assert np.mean(merged != halved["layers"]["q"][0]) < 0.05  # next to nothing is left of it
    exact = arranged.for_decoding(small, cfg=CFG)["layers"][0]["q"]
    assert exact.w_OI.dtype == jnp.float32


@pytest.mark.parametrize("targets", ["all", "all-linear", "v_proj,q_proj", " down_proj "])
def test_what_is_trained_is_the_adapters_of_the_targets(targets):
    tree = base()
    spec = LoraSpec(rank=2, targets=targets)
    with_adapters = fresh(tree, CFG, spec)
    pairs = lora.trained(with_adapters)["layers"]
    wanted = PROJECTIONS if targets.startswith("all") else [x.strip() for x in targets.split(",")]
    assert {*pairs} == {name.removesuffix("_proj") for name in wanted}
    for name, pair in pairs.items():
        shape, num = tree["layers"][name].shape, NUM_INPUTS[name]
        assert pair["a"].shape == (*shape[: 1 + num], 2)
        assert pair["b"].shape == (shape[0], 2, *shape[1 + num :])
    doubled = lora.with_trained(with_adapters, jax.tree.map(lambda x: 2 * x, {"layers": pairs}))
    assert doubled["embed"] is tree["embed"]
    for name, pair in pairs.items():
        assert doubled["layers"][name].w is tree["layers"][name]
        np.testing.assert_array_equal(doubled["layers"][name].a, 2 * pair["a"])


def test_all_of_a_plain_tree_is_trained():
    tree = base()
    assert lora.trained(tree) is tree
    assert lora.with_trained(tree, "other") == "other"


def test_adapters_lie_as_their_weights_do():
    devices = mesh.make(data=2, fsdp=2, model=2)
    declared, own = lora.specs(CFG, SPEC)["layers"], transformer.specs(CFG)["layers"]
    params.shardings(declared, devices)
    for name, pair in declared.items():
        num = NUM_INPUTS[name]
        assert pair["a"].axes == (*own[name].axes[: 1 + num], None)
        assert pair["b"].axes == (None, None, *own[name].axes[1 + num :])


MOE = FOLDERS["mixtral_tied"]


@pytest.mark.parametrize(
    ("cfg", "keys", "told"),
    [
        (
            CFG,
            {"targets": "q_proj,lm_head"},
            r"names lm_head: .*q_proj, .*lora\.targets",
        ),
        (CFG, {"targets": "query"}, "names query: expected all or some of q_proj"),
        (MOE, {"targets": "gate_proj"}, r"gate_proj.*the router and the weights of its experts"),
        (CFG, {"rank": 9}, r"lora\.rank is 9: .*at most 8, the smaller side of q_proj \(8 x 16\)"),
        (CFG, {"rank": 9, "targets": "down_proj"}, r"at most 8.*down_proj \(16 x 8\).*lora\.rank"),
    ],
)
def test_what_a_model_cannot_have_is_refused(cfg, keys, told):
    with pytest.raises(ValueError, match=told):
        lora.specs(cfg, LoraSpec(**({"rank": 2} | keys)))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rank": -1}, r"lora\.rank is -1"),
        ({"alpha": 0.0}, r"lora\.alpha is 0\.0: expected above 0"),
        ({"targets": " , "}, r"lora\.targets is ' , '"),
    ],
)
def test_values_that_mean_nothing_are_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        LoraSpec(**keys)


def test_adapters_of_dense_layers_beside_experts_are_no_folder_of_peft(tmp_path):
    name = "qwen3_moe_untied_mixed_sharded"
    cfg, tree = hf.load(GOLDENS / name)
    adapters = lora.trained(grown(tree, cfg))
    with pytest.raises(
        ValueError, match=r"layers\.\d\.mlp\..* beside layers of experts.*--adapter"
    ):
        peft.save(tmp_path / "a", cfg, SPEC, adapters, name, source=GOLDENS / name, card="")
    assert not (tmp_path / "a").exists()
