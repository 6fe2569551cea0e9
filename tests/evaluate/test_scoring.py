"""Log-likelihood of continuations, against the logits of whole sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from opd_jax import mesh as meshlib
from opd_jax.evaluate import scoring
from opd_jax.models import transformer
from opd_jax.store import pair as pairs

tiny = tiny_run.tiny


@pytest.fixture(scope="module")
def opened(tiny):
    model = pairs.open_model(
        str(tiny / "student"), mesh=meshlib.make(devices=jax.devices()[:1]), dtype="float32"
    )
    return model, model.load()


def rows(seed=0, num=11):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 631, m).tolist(), rng.integers(0, 631, n).tolist())
        for m, n in itertools.islice(itertools.cycle([(1, 2), (40, 9), (1, 1), (45, 4)]), num)
    ]


def found(model, params, given, batch=4):
    logp, greedy = np.full(len(given), np.nan), np.zeros(len(given), bool)
    for places, some_logp, some_greedy in scoring.scores(
        params,
        given,
        model.mesh,
        cfg=model.cfg,
        num_ids=model.num_ids,
        pad_id=0,
        batch=batch,
    ):
        logp[places], greedy[places] = some_logp, some_greedy
    return logp, greedy


def expected(model, params, context, continuation):
    """By the logits of every position of one row."""
    ids = jnp.asarray([[*context, *continuation]])
    with jax.set_mesh(model.mesh):
        logits = np.asarray(transformer.logits(params, ids, cfg=model.cfg))[0, :, : model.num_ids]
    table = logits - np.log(np.exp(np.float64(logits)).sum(axis=1, keepdims=True))
    at = np.arange(len(context) - 1, len(context) + len(continuation) - 1)
    return table[at, continuation].sum(), bool((table[at].argmax(axis=1) == continuation).all())


def test_scores_are_those_of_the_whole_logits(opened):
    model, params = opened
    given = rows()
    # One that greedy decoding gives: its best id, twice.
    context = given[0][0]
    with jax.set_mesh(model.mesh):
        for _ in range(2):
            logits = transformer.logits(params, jnp.asarray([context]), cfg=model.cfg)
            context = [*context, int(np.asarray(logits)[0, -1, : model.num_ids].argmax())]
    given.append((context[:-2], context[-2:]))
    logp, greedy = found(model, params, given)
    wanted = [expected(model, params, *row) for row in given]
    np.testing.assert_allclose(logp, [x for x, _ in wanted], rtol=1e-5)
    assert greedy.tolist() == [x for _, x in wanted]
    assert greedy[-1]


def test_the_batch_changes_nothing(opened):
    model, params = opened
    given = rows(1)
    one, four = found(model, params, given, 1), found(model, params, given, 4)
    np.testing.assert_allclose(one[0], four[0], rtol=1e-6)
    assert one[1].tolist() == four[1].tolist()


def test_a_mesh_changes_nothing(tiny, opened):
    given = rows(2)
    model = pairs.open_model(str(tiny / "student"), mesh=meshlib.make(2, 2, 2), dtype="float32")
    np.testing.assert_allclose(
        found(model, model.load(), given)[0], found(*opened, given)[0], rtol=1e-5
    )


def test_nothing_to_score(opened):
    assert list(scoring.scores(opened[1], [], opened[0].mesh, cfg=opened[0].cfg, num_ids=1,
                               pad_id=0, batch=4)) == []  # fmt: skip
