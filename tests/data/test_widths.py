"""Padded widths: every row fits, few are compiled, and what is added saves what it promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.data import widths


def test_bucket_is_the_smallest_that_fits():
    assert [widths.bucket(n, (4, 8)) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    with pytest.raises(ValueError, match=r"9 ids and buckets \(4, 8\)"):
        widths.bucket(9, (4, 8))


def test_the_ladder():
    assert [widths.padded(n) for n in (1, 64, 65, 97, 129, 200, 257)] == [
        *(64, 64, 96, 128, 192, 256, 384)
    ]
    assert widths.ladder(56) == (56,)
    assert widths.ladder(64) == (64,)
    assert widths.ladder(100) == (64, 96, 100)
    assert widths.ladder(512) == (64, 96, 128, 192, 256, 384, 512)


@given(st.integers(1, 100_000))
def test_no_row_is_padded_to_half_as_much_again(length):
    width = widths.padded(length)
    assert length <= width
    assert width == 64 or width < 1.5 * length + 1
    steps = widths.ladder(length)
    assert steps[-1] == length
    assert list(steps) == sorted({*steps})


@given(
    st.lists(st.integers(1, 2_000), min_size=1, max_size=60),
    st.integers(1, 64),
    st.integers(0, 9),
)
def test_prompt_widths_hold_every_prompt_and_are_few(lengths, batch, more):
    limit = max(lengths) + more
    found = widths.of_prompts(lengths, batch=batch, limit=limit)
    assert found[-1] >= max(lengths)
    assert found[-1] <= limit
    assert found[-1] - max(lengths) < 8
    assert list(found) == sorted({*found})
    assert len(found) <= 3


def test_a_further_prompt_width_is_for_batches_that_use_it():
    """One long prompt in a thousand: nearly every batch of 8 fits the short width."""
    lengths = [46] * 999 + [500]
    assert widths.of_prompts([46] * 10, batch=8, limit=512) == (48,)
    assert widths.of_prompts(lengths, batch=8, limit=512) == (64, 504)
    assert widths.of_prompts(lengths, batch=5_000, limit=512) == (504,)
    rng = np.random.default_rng(0)
    columns = [
        widths.bucket(max(rng.choice(lengths, 8)), widths.of_prompts(lengths, batch=8, limit=512))
        for _ in range(500)
    ]
    assert np.mean(columns) < 80  # of 504
