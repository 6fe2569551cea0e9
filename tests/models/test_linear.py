import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import mesh
from opd_jax.models import linear

ROWS = 4
# As model.specs declares them: split by output, split by input, and several dimensions of either.
CASES = {
    "up": ((6, 8), 1, (None, "model")),
    "down": ((8, 6), 1, ("model", None)),
    "q": ((6, 2, 3, 4), 1, (None, "model", None, None)),
    "o": ((2, 3, 4, 6), 3, ("model", None, None, None)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_spread", [False, True])
def test_a_turned_weight_gives_the_same_product(name, is_spread):
    shape, num_inputs, axes = CASES[name]
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(ROWS, *shape[:num_inputs])).astype(np.float32)
    expected = np.tensordot(x, w, num_inputs)

    def run(x, w):
        w = mesh.constrain(w, *axes)
        x = mesh.constrain(x, mesh.BATCH, *axes[:num_inputs])
        plain = linear.times(x, w, mesh.out(mesh.BATCH, *axes[num_inputs:]))
        return plain, linear.times(x, linear.turn(w, num_inputs, axes=axes))

    if is_spread:
        with jax.set_mesh(mesh.make(data=2, fsdp=2, model=2)):
            plain, turned = jax.jit(run)(x, w)
        assert turned.sharding.spec == plain.sharding.spec
    else:
        plain, turned = jax.jit(run)(x, w)
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    np.testing.assert_allclose(turned, expected, atol=1e-5)


def test_the_weight_stays_the_left_factor():
    """What the decode loop gains by it is lost where XLA swaps the factors back."""
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 64), (ROWS, 64)))
    run = jax.jit(lambda w, x: linear.from_left(w, x, None) + 1)
    assert "f32[512,4]" in run.lower(w, x).compile().as_text()
    swapped = jax.jit(lambda w, x: (w @ x.T).T + 1)
    assert "f32[512,4]" not in swapped.lower(w, x).compile().as_text()
