"""Log-likelihood of given continuations, without the logits of a whole sequence in memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from opd_jax import mesh as meshlib
from opd_jax.data import batches as batching
from opd_jax.data import widths
from opd_jax.models import linear, transformer
from opd_jax.models.transformer import ModelConfig
from opd_jax.pytrees import Params

_FEWEST = 8  # scored ids that a program has room for, at least


@functools.partial(jax.jit, static_argnames=("cfg", "num_ids", "columns"))
def score(
    params: Params,
    ids_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    scored_B: Int[Array, " B"],
    *,
    cfg: ModelConfig,
    num_ids: int,
    columns: int,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    r"""Sum of :math:`\log p(y_t \mid y_{<t})` over the last ids of each row, and if all are argmax.

    Args:
      params: of the model.
      ids_BT: left-padded rows.
      start_B: where each row starts.
      scored_B: how many of its last ids are scored; at most ``columns``, and never the first.
      cfg: static.
      num_ids: static; logits of the padding from there on count as nothing.
      columns: static; the last columns that any row scores.

    Sums are in float32. **Sharding**: rows over the batch axes.
    """
    num_rows, width = ids_BT.shape
    ids_BT = meshlib.constrain(ids_BT, meshlib.BATCH, None)
    valid_BT = jnp.arange(width)[None, :] >= start_B[:, None]
    h_BTD, _ = transformer.hidden(
        params, ids_BT, transformer.positions(valid_BT), valid_BT, cfg=cfg
    )
    w_VD = transformer.head(params, cfg)
    is_real_1V = jnp.arange(w_VD.shape[0])[None, :] < num_ids

    def add(carry, inputs):
        total_B, greedy_B = carry
        h_BD, id_B, column = inputs
        logits_BV = linear.from_left(w_VD, h_BD, "model", jnp.float32)
        logits_BV = meshlib.constrain(logits_BV, meshlib.BATCH, None)
        logits_BV = jnp.where(is_real_1V, logits_BV, -jnp.inf)
        chosen_B = jnp.sum(
            jnp.where(jnp.arange(logits_BV.shape[1])[None, :] == id_B[:, None], logits_BV, 0.0),
            axis=1,
        )
        logp_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=1)
        is_scored_B = columns - column <= scored_B
        is_best_B = jnp.argmax(logits_BV, axis=1) == id_B
        return (
            total_B + jnp.where(is_scored_B, logp_B, 0.0),
            greedy_B & (is_best_B | ~is_scored_B),
        ), None

    carry = (
        meshlib.constrain(jnp.zeros(num_rows, jnp.float32), meshlib.BATCH),
        meshlib.constrain(jnp.ones(num_rows, bool), meshlib.BATCH),
    )
    inputs = (
        jnp.swapaxes(h_BTD[:, width - 1 - columns : width - 1], 0, 1),
        ids_BT[:, width - columns :].T,
        jnp.arange(columns),
    )
    return jax.lax.scan(add, carry, inputs)[0]


def scores(
    params: Params,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    mesh: Mesh,
    *,
    cfg: ModelConfig,
    num_ids: int,
    pad_id: int,
    batch: int,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Score continuations of contexts, long ones first, in batches of one width.

    Args:
      params: of the model.
      rows: ids of context (at least one) and continuation (at least one) each.
      mesh: devices.
      cfg, num_ids: as :func:`score`.
      pad_id: fills rows up.
      batch: rows at a time.

    Yields:
      Places of a batch in ``rows``, their log-likelihoods in nats, and whether each continuation
      is what greedy decoding would give.
    """
    size = meshlib.batch_rows(min(batch, max(len(rows), 1)), mesh)
    shapes = [(widths.padded(len(a) + len(b)), _wide(len(b), _FEWEST)) for a, b in rows]
    order = sorted(range(len(rows)), key=lambda place: shapes[place], reverse=True)
    with jax.set_mesh(mesh):
        for width, columns in sorted({*shapes}, reverse=True):
            places = [place for place in order if shapes[place] == (width, columns)]
            for first in range(0, len(places), size):
                part = places[first : first + size]
                filled = part + [part[0]] * (size - len(part))
                prompt = batching.pad([[*rows[i][0], *rows[i][1]] for i in filled], width, pad_id)
                lengths = np.array([len(rows[i][1]) for i in filled], np.int32)
                own = meshlib.own_rows((prompt.ids_BP, prompt.start_B, lengths))
                found = score(
                    params,
                    *meshlib.to_global(own, mesh),
                    cfg=cfg,
                    num_ids=num_ids,
                    columns=min(columns, width - 1),
                )
                logp_B, greedy_B = meshlib.to_host(found)
                yield part, logp_B[: len(part)], greedy_B[: len(part)]


def _wide(length: int, least: int) -> int:
    """The least double of ``least`` that holds ``length``."""
    while least < length:
        least *= 2
    return least
