"""Predictors of a type's effect, against sums by hand."""

import csv

import numpy as np
import pytest

from opd_jax import files
from opd_jax.data import tokenizer as tokenizers
from opd_jax.instrument.corpus import Occurrences
from opd_jax.instrument.knockout import effects, targets


def occurrences(token_id, kl, entropy):
    zeros = np.zeros(len(token_id), np.float32)
    places = np.arange(len(token_id), dtype=np.int32)
    values = {"log_ratio": zeros, "logp": zeros, "teacher_entropy": zeros}
    return Occurrences(
        answer=places * 0,
        problem=places * 0,
        position=places,
        token_id=np.array(token_id, np.int32),
        kl=np.array(kl, np.float32),
        entropy=np.array(entropy, np.float32),
        vocab_size=600,
        **values,
    )


def test_columns_from_the_scores_beside_a_table(tmp_path):
    """Ten positions: 19 got worse where its KL was high already, 22 improved, 30 was not seen."""
    ids = [19] * 4 + [22] * 6
    before = occurrences(ids, [9, 9, 1, 1, 5, 5, 5, 5, 5, 5], [1] * 10)
    after = occurrences(ids, [9.5, 9.2, 0.5, 0.5, 1, 1, 1, 1, 1, 1], [0.5] * 10)
    (tmp_path / "scores").mkdir()
    before.save(tmp_path / "scores" / "undistilled.npz")
    after.save(tmp_path / "scores" / "student.npz")
    with (tmp_path / "types.csv").open("w") as stream:
        csv.writer(stream).writerows(
            [["token_id", "count", "kl_mean"], [22, 6, 1.0], [19, 4, 4.9], [30, 0, ""]]
        )
    tokenizer = tokenizers.load(files.path_of("embedded:student"))
    table = targets.read(str(tmp_path / "types.csv"), "", tokenizer, 600).table
    assert table["rock_count"] == (0.0, 2.0, None)
    assert table["rock_rate"] == (0.0, 0.5, None)
    assert table["kl_mean_before"] == pytest.approx((5.0, 5.0, None))
    assert table["improvement"] == pytest.approx((4.0, (-0.5 - 0.2 + 0.5 + 0.5) / 4, None))
    assert table["entropy_mean_before"] == (1.0, 1.0, None)
    told = effects.correlations(table, [0.1, -0.2, 0.0], seed=0)
    assert [row["predictor"] for row in told] == [
        *("frequency", "rock count", "rock rate", "KL before", "KL after", "improvement"),
        "student entropy before",
    ]
    (tmp_path / "scores" / "undistilled.npz").unlink()
    assert "rock_count" not in targets.read(str(tmp_path / "types.csv"), "", tokenizer, 600).table
