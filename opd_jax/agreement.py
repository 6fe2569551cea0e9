r"""What the teacher makes of the student's favourites, measured beside a divergence where asked.

With p the student's distribution at a position and q the teacher's:

=============  ======================================================  ===========================
``rank``       ids that q holds likelier than argmax p; 0: its own     SelecTKD, arXiv 2510.24021
``overlap``    q of the ``FAVOURITES`` likeliest ids of p together     TA-OPD, arXiv 2605.26844
=============  ======================================================  ===========================

Both compare single ids: stop ids are not merged for them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

MEASURES = ("rank", "overlap")
FAVOURITES = 16
_MASKED = -1e30  # as in opd_jax.divergence


def measured(names, zs_CV, zt_CV, norm_C, *, first_id, vocab_size, over_vocab):
    """The measures of C positions, [C, N] f32, the same on every vocabulary shard.

    Args:
      names: some of ``MEASURES``.
      zs_CV, zt_CV: f32 logits of student and teacher, this shard's columns.
      norm_C: log normaliser of the teacher.
      first_id: id of the shard's first column.
      vocab_size: ids from there on are padding; None: there are none.
      over_vocab: mesh axes that the vocabulary is split over, empty on one shard.
    """
    if vocab_size is not None:
        is_real_1V = (first_id + jnp.arange(zs_CV.shape[1]) < vocab_size)[None, :]
        zs_CV, zt_CV = (jnp.where(is_real_1V, z_CV, _MASKED) for z_CV in (zs_CV, zt_CV))
    of = {
        "rank": lambda: _rank(zs_CV, zt_CV, over_vocab),
        "overlap": lambda: _overlap(zs_CV, zt_CV, norm_C, over_vocab),
    }
    return jnp.stack([of[name]() for name in names], axis=-1)


def _favourites(zs_CV, zt_CV, count: int, over_vocab):
    """Logits under the teacher of the student's likeliest ids, [C, K]; the smaller id on ties."""
    zs_CK, id_CK = lax.top_k(zs_CV, min(count, zs_CV.shape[1]))
    zt_CK = jnp.take_along_axis(zt_CV, id_CK, axis=1)
    if not over_vocab:
        return zt_CK
    zs_CK, zt_CK = (lax.all_gather(x, over_vocab, axis=1, tiled=True) for x in (zs_CK, zt_CK))
    place_CK = lax.top_k(zs_CK, min(count, zs_CK.shape[1]))[1]
    return jnp.take_along_axis(zt_CK, place_CK, axis=1)


def _rank(zs_CV, zt_CV, over_vocab):
    top_C1 = _favourites(zs_CV, zt_CV, 1, over_vocab)
    above_C = jnp.sum(zt_CV > top_C1, axis=1, dtype=jnp.float32)
    return lax.psum(above_C, over_vocab) if over_vocab else above_C


def _overlap(zs_CV, zt_CV, norm_C, over_vocab):
    zt_CK = _favourites(zs_CV, zt_CV, FAVOURITES, over_vocab)
    return jnp.sum(jnp.exp(zt_CK - norm_C[:, None]), axis=1)
