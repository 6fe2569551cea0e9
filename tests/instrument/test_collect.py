"""Answers and their measurements: resumed exactly, measured exactly, on any mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny_run

from opd_jax import mesh
from opd_jax.data import batches
from opd_jax.data import prompts as prompt_files
from opd_jax.instrument import collect, corpus
from opd_jax.instrument.corpus import CorpusError, TypeStats
from opd_jax.models import transformer
from opd_jax.rollout import decode
from opd_jax.store import pair as pairs

tiny = tiny_run.tiny
FLAGS = {"max_new": 6, "samples": 2, "seed": 3, "batch": 4}


def opened(tiny, devices=1, **axes):
    given = mesh.make(devices=jax.devices()[:devices], **axes)
    return pairs.open_pair(f"{tiny}/student", f"{tiny}/teacher", mesh=given)


@pytest.fixture(scope="module")
def pair(tiny):
    return opened(tiny)


@pytest.fixture(scope="module")
def rows(tiny, pair):
    return prompt_files.examples(f"{tiny}/prompts.jsonl", prompt_files.DataSpec(), pair.tokenizer)[
        0
    ][:10]


@pytest.fixture(scope="module")
def written(pair, rows, tmp_path_factory):
    return collect.write(tmp_path_factory.mktemp("written") / "corpus", pair, rows, **FLAGS)


def logits_of(tree, cfg, ids):
    """[T, V] f64 of one sequence, on one device without a mesh."""
    tree = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)
    return np.asarray(transformer.logits(tree, jnp.asarray(ids[None]), cfg=cfg), np.float64)[0]


def ids(found):
    return [answer.tolist() for answer in found.answers]


class Killed(BaseException):
    """Stands for a kill: nothing in the code catches it."""


def kill_after(patch, pieces):
    """Let a collection die after it has sampled, before it writes, piece ``pieces``."""
    write = corpus.write_answers

    def dying(folder, number, rows):
        if number == pieces:
            raise Killed
        write(folder, number, rows)

    patch.setattr(corpus, "write_answers", dying)


def test_a_corpus_says_who_wrote_what(pair, rows, written):
    assert written.problem_A.tolist() == [row.index for row in rows for _ in range(2)]
    assert [p.tolist() for p in written.prompts] == [list(r.ids) for r in rows for _ in range(2)]
    assert all(1 <= len(answer) <= 6 for answer in written.answers)
    assert written.info["writer"] == pair.student_name
    assert written.info["tokenizer_size"] == 631
    assert written.info["pieces"] == 3
    for answer, is_cut in zip(written.answers, written.truncated_A, strict=True):
        assert (2 in answer) != is_cut
        assert 2 not in answer[:-1]


def test_an_answer_is_the_rollout_of_its_line(pair, rows, written):
    prompt = batches.pad([rows[7].ids], len(rows[7].ids), 0)
    with jax.set_mesh(pair.mesh):
        alone = decode.sample(
            pair.student,
            mesh.to_global(prompt, pair.mesh),
            jax.random.key(3),
            cfg=pair.cfg.student,
            sampler=pair.sampler,
            max_new=6,
            samples=2,
            rows_B=mesh.to_global(np.array([rows[7].index], np.int32), pair.mesh),
        )
    for sample in range(2):
        expected = np.asarray(alone.ids_BT[sample])[np.asarray(alone.mask_BT[sample])]
        assert written.answers[14 + sample].tolist() == expected.tolist()


@pytest.mark.parametrize("slots", [0, 3])
def test_neither_batch_nor_slots_nor_the_other_prompts_change_an_answer(
    pair, rows, written, tmp_path, slots
):
    given = FLAGS | {"batch": 2, "slots": slots}
    part = collect.write(tmp_path / "part", pair, rows[3:6], **given)
    assert ids(part) == ids(written)[6:12]


@pytest.mark.parametrize("batch", [4, 3])
def test_a_killed_collection_goes_on_after_its_last_whole_piece(
    pair, rows, written, tmp_path, batch
):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            collect.write(tmp_path, pair, rows, **FLAGS)
    with pytest.raises(CorpusError, match="collected to the end"):
        corpus.read(tmp_path)
    (tmp_path / ".answers-00001.npz.part").write_bytes(b"half")
    lines = []
    again = collect.write(tmp_path, pair, rows, **FLAGS | {"batch": batch}, say=lines.append)
    assert "going on after 4 of 10 prompts" in lines[0]
    assert ids(again) == ids(written)
    assert again.problem_A.tolist() == written.problem_A.tolist()
    assert again.truncated_A.tolist() == written.truncated_A.tolist()
    assert not (tmp_path / collect.STARTED).exists()


def test_a_damaged_piece_and_what_follows_it_are_written_again(pair, rows, written, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            collect.write(tmp_path, pair, rows, **FLAGS)
    corpus.piece(tmp_path, 0).write_bytes(b"PK\x03\x04damaged")
    again = collect.write(tmp_path, pair, rows, **FLAGS)
    assert ids(again) == ids(written)


def test_a_finished_collection_is_read_and_not_sampled_again(pair, rows, written, tmp_path):
    first = collect.write(tmp_path, pair, rows[:2], **FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "sample", None)
        assert ids(collect.write(tmp_path, pair, rows[:2], **FLAGS)) == ids(first)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "--seed 3, now it is 4"),
        ({"max_new": 5}, "--max-new 6, now it is 5"),
        ({"samples": 1}, "--samples 2, now it is 1"),
        ({"temperature": 0.5}, "--temperature 1.0, now it is 0.5"),
        ({"name": "other", "writer": {}}, "the writer .*now it is 'other'"),
        ({"rows": 1}, "other prompts"),
    ],
)
def test_other_flags_are_refused(pair, rows, tmp_path, change, named, is_finished):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 9 if is_finished else 1)
        if is_finished:
            collect.write(tmp_path, pair, rows[:2], **FLAGS)
        else:
            with pytest.raises(Killed):
                collect.write(tmp_path, pair, rows[:2], **FLAGS | {"batch": 1})
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    given = rows[: change.get("rows", 2)]
    change = {name: value for name, value in change.items() if name != "rows"}
    with pytest.raises(CorpusError, match=f"{named}.*expected the same.*another --out"):
        collect.write(tmp_path, pair, given, **FLAGS | change)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_folder_of_something_else_is_refused(pair, rows, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"holds notes\.txt and no corpus.*another --out"):
        collect.write(tmp_path, pair, rows, **FLAGS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_new": 0}, "--max-new is 0"),
        ({"max_new": 60}, "64 together.*lower --max-new"),
        ({"samples": 0}, "--samples is 0"),
        ({"slots": 9}, "slots is 9 for batches of 8 rows"),
        ({"temperature": 0}, "--samples is 2 at --temperature 0"),
        ({"name": "somebody"}, "pass name="),
    ],
)
def test_flags_out_of_range_are_named(pair, rows, tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        collect.write(tmp_path / "new", pair, rows, **FLAGS | change)
    assert not (tmp_path / "new").exists()


def test_no_rows(pair, tmp_path):
    with pytest.raises(ValueError, match="no prompts"):
        collect.write(tmp_path, pair, [], **FLAGS)


def test_greedy_answers_are_the_argmax(pair, rows, tmp_path):
    greedy = FLAGS | {"temperature": 0.0, "samples": 1}
    found = collect.write(tmp_path, pair, rows[:2], **greedy)
    logits_TV = logits_of(
        pair.student, pair.cfg.student, np.concatenate([found.prompts[0], found.answers[0]])
    )
    start = len(found.prompts[0])
    assert logits_TV[start - 1 : -1, :631].argmax(-1).tolist() == found.answers[0].tolist()


def test_the_teacher_can_write(pair, rows, tmp_path, written):
    teacher = {"writer": pair.teacher, "name": "teacher", "cfg": pair.cfg.teacher}
    found = collect.write(tmp_path, pair, rows, **teacher, **FLAGS)
    assert found.info["writer"] == "teacher"
    assert ids(found) != ids(written)


def test_logits_that_are_not_finite_stop_the_collection(pair, rows, tmp_path):
    broken = pair.student | {"embed": pair.student["embed"] * np.nan}
    with pytest.raises(CorpusError, match=r"broken gave logits that are not finite.*line 1"):
        collect.write(tmp_path, pair, rows, writer=broken, name="broken", **FLAGS)
    assert not corpus.piece(tmp_path, 0).exists()


def reference(found, pair, answer):
    """KL, log-probabilities and entropies of one answer, float64 numpy from unchunked logits."""
    whole = np.concatenate([found.prompts[answer], found.answers[answer]])
    start = len(found.prompts[answer])
    logs = []
    for tree, cfg in ((pair.student, pair.cfg.student), (pair.teacher, pair.cfg.teacher)):
        logits = logits_of(tree, cfg, whole)[start - 1 : -1, : pair.vocab_size]
        logs.append(logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True))
    p, q = (np.exp(log) for log in logs)
    at = np.arange(len(whole) - start), whole[start:]
    return {
        "kl": (p * (logs[0] - logs[1])).sum(-1),
        "logp": logs[0][at],
        "log_ratio": logs[0][at] - logs[1][at],
        "entropy": -(p * logs[0]).sum(-1),
        "teacher_entropy": -(q * logs[1]).sum(-1),
    }


def test_scores_are_exact(pair, written):
    found = collect.score(written, pair, batch=3)
    assert len(found) == written.num_positions
    assert found.token_id.tolist() == written.token_id.tolist()
    assert found.problem.tolist() == written.problem_A[written.answer].tolist()
    assert found.vocab_size == 640
    for answer in range(len(written.answers)):
        for name, expected in reference(written, pair, answer).items():
            here = getattr(found, name)[found.answer == answer]
            np.testing.assert_allclose(here, expected, rtol=2e-4, atol=2e-5, err_msg=name)
    assert found.kl.min() >= 0
    assert found.kl.mean() > 0.01  # the pair differs


def test_another_student_takes_the_students_place(pair, written):
    itself = collect.score(written, pair, student=pair.teacher)
    np.testing.assert_allclose(itself.kl, 0, atol=1e-6)
    np.testing.assert_allclose(itself.log_ratio, 0, atol=1e-5)


def test_the_sums_of_the_devices_are_those_of_the_positions(pair, written):
    found, sums = collect.score_types(written, pair, batch=4)
    host = TypeStats.of_occurrences(found)
    np.testing.assert_array_equal(sums.count, host.count)
    np.testing.assert_allclose(sums.kl_sum, host.kl_sum, rtol=1e-5)
    np.testing.assert_allclose(sums.kl_sq, host.kl_sq, rtol=1e-5)
    assert sums.count.sum() == written.num_positions


def test_a_mesh_changes_nothing(tiny, pair, rows, written, tmp_path):
    other = opened(tiny, devices=8, fsdp=2, model=2)
    again = collect.write(tmp_path, other, rows, **FLAGS | {"batch": 3})
    assert ids(again) == ids(written)
    one, sums_one = collect.score_types(written, pair)
    eight, sums_eight = collect.score_types(written, other)
    np.testing.assert_allclose(eight.kl, one.kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(eight.log_ratio, one.log_ratio, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(sums_eight.count, sums_one.count)
    np.testing.assert_allclose(sums_eight.kl_sum, sums_one.kl_sum, rtol=1e-4, atol=1e-6)


def test_a_corpus_of_another_tokenizer_is_refused(pair, written, tmp_path):
    rows = [{"prompt": [5], "answer": [635, 2], "problem": 0, "truncated": False}]
    corpus.write_answers(tmp_path, 0, rows)
    corpus.write_manifest(tmp_path, {"pieces": 1, "writer": "x"})
    with pytest.raises(CorpusError, match=r"holds id 635.*the 631 ids.*collect a corpus"):
        collect.score(corpus.read(tmp_path), pair)
    info = dict(written.info) | {"tokenizer_size": 700}
    other = corpus.Corpus(
        info, written.prompts, written.answers, written.problem_A, written.truncated_A
    )
    with pytest.raises(CorpusError, match="tokenizer of 700 ids"):
        collect.score(other, pair)


def test_a_corpus_past_the_positions_is_refused(pair, tmp_path):
    rows = [{"prompt": [5] * 60, "answer": [6] * 5, "problem": 0, "truncated": True}]
    corpus.write_answers(tmp_path, 0, rows)
    corpus.write_manifest(tmp_path, {"pieces": 1, "writer": "x"})
    with pytest.raises(CorpusError, match=r"position 65.*64.*--max-new"):
        collect.score(corpus.read(tmp_path), pair)


def test_the_flags_of_a_collection_stand_beside_its_pieces(pair, rows, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            collect.write(tmp_path, pair, rows, **FLAGS)
    assert json.loads((tmp_path / collect.STARTED).read_text())["seed"] == 3
    (tmp_path / collect.STARTED).write_text("{")
    with pytest.raises(CorpusError, match=r"is damaged \(not JSON"):
        collect.write(tmp_path, pair, rows, **FLAGS)
