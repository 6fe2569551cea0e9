"""Evaluation: what is counted, over which rows, and against what it is checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from opd_jax import mesh, steps
from opd_jax.data.prompts import Example
from opd_jax.evaluate import grading, heldout
from opd_jax.models import transformer
from opd_jax.rollout import answers as drawing
from opd_jax.run import assemble, initial

tiny = tiny_run.tiny


@pytest.fixture(scope="module")
def parts(tiny):
    """(assembly, student, teacher, state) of the tiny run on one device."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.use_one_device(patch)
        made = assemble.assemble(
            tiny_run.resolved(tiny, eval__every=1, eval__batch=8), say=lambda line: None
        )
        state = initial.state(made)
        return made, state.params, initial.teacher_params(made), state.rock


def run(parts, rows=None, seed=0, teacher=None, **changes):
    return graded_run(parts, rows, seed, teacher, **changes)[0]


def graded_run(parts, rows=None, seed=0, teacher=None, **changes):
    made, student, loaded, rock = parts
    with jax.set_mesh(made.mesh):
        return heldout.evaluate(
            student,
            loaded if teacher is None else teacher,
            rock,
            made.heldout if rows is None else rows,
            made.tokenizer,
            jax.random.key(seed),
            made.mesh,
            cfg=made.cfg,
            plan=dataclasses.replace(made.plan, **changes),
        )


def example(index, answer):
    return Example(ids=(1,), answer=answer, text="", index=index)


def test_batches_fill_up_with_their_first_row():
    rows = [example(i, None) for i in range(5)]
    cut = list(drawing.batches(rows, 3))
    assert [[row.index for row in part] for part, _ in cut] == [[0, 1, 2], [3, 4, 3]]
    assert [real for _, real in cut] == [3, 2]
    assert list(drawing.batches([], 3)) == []


def test_grading_counts_every_sample_of_rows_with_an_answer():
    rows = [example(0, "4"), example(1, None), example(5, "7")]
    answers = [f"#### {x}" for x in (4, 5, 1, 2, 7, 7)]
    graded = heldout.grade(rows, answers, 2)
    assert graded.index == (0, 5)  # lines of the file
    assert graded.correct == ((True, False), (True, True))
    assert graded.accuracy == 0.75
    assert graded.unparsed_share == 0
    none = heldout.grade(rows[1:2], answers[:2], 2)
    assert none.accuracy is none.unparsed_share is None


def test_a_format_that_is_not_read_does_not_look_like_wrong_answers():
    rows = [example(0, "4"), example(1, "5")]
    graded = heldout.grade(rows, ["it is 4", "#### 4", "#### 6", "<think>5"], 2)
    assert graded.correct == ((False, True), (False, False))
    assert graded.unparsed == ((True, False), (False, True))
    assert graded.reason[0] == ("no answer", "same text")
    assert graded.unparsed_share == 0.5


def test_prompt_length_and_grader_reach_the_grading(tmp_path):
    """A thought that the prompt opened, a cut answer, and a function of the user's own."""
    row = dataclasses.replace(example(0, "4"), text="2 + 2?<think>")
    plain = example(1, "4")
    graded = heldout.grade([row, plain], ["#### 4", "#### 4"], 1, truncated=[False, True])
    assert graded.correct == ((False,), (False,))
    assert graded.reason == (("unfinished thought",), ("unfinished answer",))
    own = tmp_path / "own.py"
    own.write_text("def grade(text, gold):\n    return gold in text\n")
    assert heldout.grade([plain], ["is 4"], 1, grader=f"{own}:grade").accuracy == 1
    assert heldout.grade([plain], ["4"], 1, grader="numeric").accuracy == 1


def test_the_grader_of_the_config_is_looked_up_before_anything_is_sampled(tiny, monkeypatch):
    tiny_run.use_one_device(monkeypatch)
    made = assemble.assemble(
        tiny_run.resolved(tiny, eval__every=1, eval__grader="numeric"), say=lambda line: None
    )
    assert made.plan.grader == "numeric"
    with pytest.raises(ValueError, match="there is no grader 'numerical'"):
        dataclasses.replace(made.plan, grader="numerical")


def test_kl_is_that_of_the_full_logits(parts):
    """The pooled KL against two softmaxes over all real ids, on the same samples."""
    made, student, teacher, _ = parts
    found = run(parts, num_graded=0, num_kl=12)
    _, kl_key = jax.random.split(jax.random.key(0))
    total = weight = 0.0
    with jax.set_mesh(made.mesh):
        for answers, real in drawing.sample(
            student,
            made.heldout,
            kl_key,
            made.mesh,
            cfg=made.cfg.student,
            sampler=made.policy,
            **made.plan.drawing,
        ):
            valid = jnp.arange(answers.ids_BT.shape[1])[None] >= answers.start_B[:, None]
            real_ids = made.policy.vocab_size  # the rest of the rows are padding
            log_p, log_q = (
                jax.nn.log_softmax(
                    transformer.logits(tree, answers.ids_BT, cfg=cfg, valid_BT=valid)[
                        ..., :real_ids
                    ]
                )
                for tree, cfg in ((student, made.cfg.student), (teacher, made.cfg.teacher))
            )
            kl = np.asarray((jnp.exp(log_p) * (log_p - log_q)).sum(-1))[:, :-1]
            scored = np.asarray(answers.mask_BT)[:, 1:] & (np.arange(8) < real)[:, None]
            total, weight = total + kl[scored].sum(), weight + scored.sum()
    assert found["kl_nats"] == pytest.approx(total / weight, rel=1e-5)
    assert found["mean_length"] == pytest.approx(weight / 12)
    assert found["accuracy"] is None


def test_rows_that_fill_a_batch_up_do_not_count(parts):
    """Nine rows are a whole batch and one row; in one batch of sixteen they are the same."""
    some = run(parts, num_graded=0, num_kl=9, size=8)
    all_at_once = run(parts, num_graded=0, num_kl=9, size=16)
    for name in heldout.FIELDS:
        if some[name] is None:
            assert all_at_once[name] is None
        else:
            assert some[name] == pytest.approx(all_at_once[name], rel=1e-5), name


def test_the_key_fixes_the_draws(parts):
    assert run(parts, num_kl=8) == run(parts, num_kl=8)
    assert run(parts, num_kl=8)["kl_nats"] != run(parts, num_kl=8, seed=1)["kl_nats"]


def test_the_teacher_itself_has_no_kl(parts):
    made, student, _, _ = parts
    assert made.cfg.student == made.cfg.teacher
    assert abs(run(parts, num_graded=0, num_kl=8, teacher=student)["kl_nats"]) < 1e-6


def test_without_kl_length_is_that_of_the_graded_answers(parts):
    found = run(parts, num_graded=4, num_kl=0)
    assert found["kl_nats"] is found["kl_gated"] is found["kl_ungated"] is None
    assert 0 <= found["accuracy"] <= 1
    assert 1 <= found["mean_length"] <= 6
    assert run(parts, num_graded=0, num_kl=0) == heldout.EMPTY


def test_which_answers_are_right_comes_with_the_accuracy(parts, monkeypatch):
    made = parts[0]
    rows = [dataclasses.replace(row, index=10 + row.index) for row in made.heldout[:5]]
    rows[1] = dataclasses.replace(rows[1], answer=None)
    asked = []

    def grade(text, answer, **how):
        asked.append((text, answer))
        is_right = len(asked) in (1, 4)  # of two answers a row
        return grading.Verdict(is_right, "so", None if len(asked) in (2, 6) else text)

    monkeypatch.setitem(grading.GRADERS, "math", grade)
    result, graded = graded_run(parts, rows, num_graded=5, num_kl=0, samples=2, temperature=1.0)
    assert graded.index == (10, 12, 13, 14)
    assert graded.correct == ((True, False), (False, True), (False, False), (False, False))
    assert result["accuracy"] == result["unparsed_share"] == 2 / 8
    assert graded.unparsed[0] == (False, True)
    assert [answer for _, answer in asked[::2]] == [rows[i].answer for i in (0, 2, 3, 4)]
    assert graded_run(parts, rows, num_graded=0, num_kl=0)[1] == heldout.Graded()


def test_graded_answers_are_greedy_and_unfiltered(parts):
    made = parts[0]
    plan = dataclasses.replace(
        made.plan, policy=dataclasses.replace(made.policy, top_k=3, top_p=0.5), temperature=0.0
    )
    assert plan.graded_sampler.temperature == 0
    assert (
        plan.graded_sampler.top_k,
        plan.graded_sampler.top_p,
        plan.graded_sampler.min_p,
    ) == (0, 1.0, 0.0)
    assert plan.graded_sampler.stop_ids == made.policy.stop_ids


def test_the_same_programs_serve_a_second_evaluation(parts):
    run(parts, num_kl=8)
    before = assemble.programs()
    run(parts, num_kl=8, seed=2)
    assert assemble.programs() == before
    assert steps.programs().items() <= before.items()


def test_eight_shards_measure_the_same(parts, tiny):
    made = assemble.assemble(
        tiny_run.resolved(
            tiny, eval__every=1, eval__batch=8, mesh__data=2, mesh__fsdp=2, mesh__model=2
        ),
        say=lambda line: None,
    )
    state = initial.state(made)
    sharded = (made, state.params, initial.teacher_params(made), state.rock)
    assert mesh.make(2, 2, 2).shape == made.mesh.shape
    found = run(sharded, num_graded=0, num_kl=8)
    expected = run(parts, num_graded=0, num_kl=8)
    assert found["kl_nats"] == pytest.approx(expected["kl_nats"], rel=1e-4)
