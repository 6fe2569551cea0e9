import numpy as np
import pytest

from opd_jax.instrument import corpus
from opd_jax.instrument.corpus import CorpusError, Occurrences, TypeStats

ROWS = (
    {"prompt": [5, 6], "answer": [1, 2, 1], "problem": 3, "truncated": False},
    {"prompt": [7], "answer": [2], "problem": 3, "truncated": True},
    {"prompt": [8, 9, 4], "answer": [3, 3, 3, 0], "problem": 7, "truncated": False},
)


@pytest.fixture
def folder(tmp_path):
    corpus.write_answers(tmp_path, 0, ROWS[:2])
    corpus.write_answers(tmp_path, 1, ROWS[2:])
    corpus.write_manifest(tmp_path, {"pieces": 2, "writer": "student"})
    return tmp_path


def test_reads_what_was_written(folder):
    found = corpus.read(folder)
    assert [ids.tolist() for ids in found.answers] == [row["answer"] for row in ROWS]
    assert [ids.tolist() for ids in found.prompts] == [row["prompt"] for row in ROWS]
    assert found.problem_A.tolist() == [3, 3, 7]
    assert found.truncated_A.tolist() == [False, True, False]
    assert found.num_positions == 8
    assert found.token_id.tolist() == [1, 2, 1, 2, 3, 3, 3, 0]
    assert found.answer.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert found.position.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_batches_put_every_position_back_where_it_came_from(folder, size):
    found = corpus.read(folder)
    out = np.full(found.num_positions, -1)
    rows = 0
    for rollout, index_B in found.batches(size, pad_id=99):
        assert rollout.ids_BT.shape[0] == size
        assert rollout.ids_BT.shape[1] % 64 == 0
        rows += int((index_B >= 0).sum())
        # At the predicting position stands the id that comes next.
        found.place(out, np.asarray(rollout.ids_BT)[:, 1:], rollout, index_B)
        for row, index in enumerate(index_B):
            mask = np.asarray(rollout.mask_BT[row])
            assert mask.any() == (index >= 0)
            if index >= 0:
                start, end = int(rollout.start_B[row]), int(np.flatnonzero(mask)[-1]) + 1
                wanted = ROWS[index]["prompt"] + ROWS[index]["answer"]
                assert rollout.ids_BT[row, start:end].tolist() == wanted
                assert bool(rollout.truncated_B[row]) == ROWS[index]["truncated"]
    assert rows == 3
    assert out.tolist() == found.token_id.tolist()


def test_widths_are_few_whichever_row_has_the_long_prompt():
    """The longest prompt and the longest answer stand in different rows: 60 + 60 columns."""
    prompts, answers = [np.arange(60), np.arange(4)], [np.arange(4), np.arange(60)]
    mixed = corpus.Corpus({}, prompts, answers, np.arange(2), np.zeros(2, bool))
    ((rollout, _),) = mixed.batches(2)
    assert rollout.ids_BT.shape == (2, 128)


def test_a_missing_unfinished_damaged_or_empty_corpus_is_refused(folder, tmp_path_factory):
    with pytest.raises(CorpusError, match=r"has no corpus\.json.*collect it again"):
        corpus.read(tmp_path_factory.mktemp("none"))
    corpus.piece(folder, 1).write_bytes(b"PK\x03\x04damaged")
    with pytest.raises(CorpusError, match="answers-00001"):
        corpus.read(folder)
    corpus.piece(folder, 1).unlink()
    with pytest.raises(CorpusError, match="piece 1 of 2"):
        corpus.read(folder)
    corpus.write_answers(folder, 0, [{**ROWS[0], "answer": []}])
    corpus.write_manifest(folder, {"pieces": 1})
    with pytest.raises(CorpusError, match="no scored token"):
        corpus.read(folder)
    with pytest.raises(ValueError, match="at least one answer"):
        corpus.write_answers(folder, 2, [])


def test_occurrences_come_back_from_a_file_and_a_choice_keeps_them_aligned(tmp_path):
    whole = Occurrences(
        *(np.arange(6, dtype=np.int32) + i for i in range(4)), *([np.ones(6)] * 5), 9
    )
    whole.save(tmp_path / "a" / "b.npz")
    again = Occurrences.load(tmp_path / "a" / "b.npz")
    assert again.vocab_size == 9
    assert again.token_id.tolist() == whole.token_id.tolist()
    part = again.where(again.token_id > 5)
    assert len(part) == 3
    assert part.answer.tolist() == [3, 4, 5]


def test_stats_sum_by_predicted_id():
    ids, kl = np.array([1, 3, 1, 1]), np.array([0.5, 2.0, 0.25, 0.0], np.float32)
    stats = TypeStats.of(ids, kl, 5)
    assert stats.count.tolist() == [0, 3, 0, 1, 0]
    assert stats.kl_sum.tolist() == [0, 0.75, 0, 2, 0]
    assert stats.kl_sq.tolist() == [0, 0.3125, 0, 4, 0]
    assert stats.mean.tolist() == [0, 0.25, 0, 2, 0]
    assert stats.kl_sum.sum() == kl.sum()
    np.testing.assert_allclose(stats.share, np.array([0, 0.75, 0, 2, 0]) / 2.75)
    np.testing.assert_allclose(stats.std, [np.nan, np.std([0.5, 0.25, 0], ddof=1), *[np.nan] * 3])
    nothing = TypeStats.of(ids, np.zeros(4), 5)
    assert nothing.share.tolist() == [0] * 5
