"""Prompt files, length limits, batching across epochs and processes, padding, completions."""

import copy
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax.data import batches, completions
from opd_jax.data import prompts as prompt_files
from opd_jax.data.completions import Limits
from opd_jax.data.prompts import DataSpec

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One id per byte, so that lengths in ids are lengths of the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {char: i for i, char in enumerate(alphabet, start=1)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def some(count, length=3):
    return [prompt_files.Example((1,) * length, None, "", index) for index in range(count)]


def indices(batch):
    return [row.index for row in batch.examples]


# Reading


def test_read_keeps_prompts_messages_answers_and_completions(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [
        {"prompt": "a", "answer": "1,024", "completion": "b", "source": "kept out"},
        {"messages": messages, "answer": 5},
        {"prompt": "c", "answer": 0.5, "messages": None},
    ]
    first, second, third = prompt_files.read(write(tmp_path / "p.jsonl", rows))
    assert first == prompt_files.Record("a", "1,024", "b", 1)
    assert second == prompt_files.Record(messages, "5", None, 2)
    assert third == prompt_files.Record("c", "0.5", None, 3)


def test_read_accepts_a_byte_order_mark_windows_line_ends_and_blank_lines_at_the_end(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n\r\n\n')
    assert [record.prompt for record in prompt_files.read(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        (b"[" * 100_000, "recursion"),
        (b"[1]", "found a list: expected a JSON object"),
        (b"7", "found a number: expected a JSON object"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"{}", "found neither among keys"),
        (b'{"text": "a"}', r"neither among keys \['text'\]"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "exactly one of"),
        (b'{"prompt": ""}', "`prompt` is the string ''"),
        (b'{"prompt": "  "}', "string with text"),
        (b'{"prompt": ["a"]}', r"`prompt\[0\]` is the string 'a'"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"messages": []}', "`messages` is an empty list"),
        (b'{"messages": "hi"}', "`messages` is the string 'hi'"),
        (b'{"messages": ["hi"]}', r"`messages\[0\]` is the string 'hi'"),
        (b'{"messages": [{"content": "a"}]}', r"messages\[0\]` role is missing"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\]` content is missing"),
        (b'{"messages": [{"role": "user", "content": [1]}]}', r"content\[0\] is a number"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "no turn to answer"),
        (b'{"prompt": "a", "answer": []}', "`answer` is an empty list"),
        (b'{"prompt": "a", "answer": ["5", null]}', r"`answer\[1\]` is missing"),
        (b'{"prompt": "a", "answer": {"value": 5}}', "`answer` is an object"),
        (b'{"prompt": "a", "answer": NaN}', "`answer` is a number"),
        (b'{"prompt": "a", "answer": true}', "`answer` is a boolean"),
        (b'{"prompt": "a", "answer": ""}', "`answer` is the string ''"),
        (b'{"prompt": "a", "completion": 5}', "`completion` is a number"),
    ],
)
def test_read_names_file_and_line_of_what_is_malformed(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b'\n{"prompt": "fine"}\n')
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: .*{message}"):
        prompt_files.read(path)


def test_read_refuses_a_missing_and_an_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        prompt_files.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b" \n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        prompt_files.read(tmp_path / "empty.jsonl")


# The specification


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"too_long": "cut"}, "too_long is 'cut'"),
        ({"max_prompt": 0}, "max_prompt is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"max_prompt": 8, "buckets": (8, 4)}, "increasing"),
        ({"max_prompt": 8, "buckets": (8, 8)}, "increasing"),
        ({"max_prompt": 8, "buckets": (0, 8)}, "increasing"),
        ({"max_prompt": 9, "buckets": (4, 8)}, "increasing widths that reach 9"),
    ],
)
def test_spec_refuses_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DataSpec(**fields)


def test_spec_is_hashable():
    spec = DataSpec(max_prompt=8, template=(("thinking", False),))
    assert hash(spec) == hash(DataSpec(max_prompt=8, template=spec.template))


# Tokenising and the length limit


def test_examples_render_and_keep_the_line_index(tokenizer, tmp_path):
    rows = [{"prompt": "toolong"}, {"messages": [{"role": "user", "content": "ab"}], "answer": "5"}]
    path = write(tmp_path / "p.jsonl", rows)
    kept, counts = prompt_files.examples(path, DataSpec(max_prompt=3), tokenizer)
    (row,) = kept
    assert (row.text, row.answer, row.index, row.completion) == ("ab>", "5", 1, ())
    assert list(row.ids) == tokenizer.encode("ab>")
    assert counts == prompt_files.Counts(kept=1, dropped=1)
    assert "1 dropped as too long" in str(counts)


def test_one_line_says_what_was_read_and_what_the_model_sees(tokenizer, tmp_path):
    said = []
    path = write(tmp_path / "p.jsonl", [{"prompt": "x" * 300, "gold": 1}, {"prompt": "ab"}])
    prompt_files.examples(path, DataSpec(system="s"), tokenizer, say=said.append)
    first, second = said
    assert first.startswith(f"read {path}: JSON lines, 2 rows with `prompt`; the first as the ")
    assert first.endswith(f"302 ids: 's{'x' * 96}...'")
    assert "gold may hold answers and is not used" in second


def test_left_truncation_keeps_the_end_and_is_counted(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "abcdef"}, {"prompt": "gh"}])
    spec = DataSpec(max_prompt=3, too_long="left_truncate")
    kept, counts = prompt_files.examples(path, spec, tokenizer)
    assert [row.text for row in kept] == ["def", "gh"]
    assert counts == prompt_files.Counts(kept=2, truncated=1)


def test_a_prompt_at_the_limit_is_kept(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "abc"}])
    _, counts = prompt_files.examples(path, DataSpec(max_prompt=3, too_long="error"), tokenizer)
    assert counts == prompt_files.Counts(kept=1)


def test_too_long_can_be_an_error_with_file_and_line(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "abc"}, {"prompt": "abcd"}])
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the prompt has 4 ids and max_prompt is 3"):
        prompt_files.examples(path, DataSpec(max_prompt=3, too_long="error"), tokenizer)


def test_dropping_every_prompt_is_an_error(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "abcd"}] * 2)
    with pytest.raises(ValueError, match=r"0 prompts kept.*2 dropped.*raise max_prompt"):
        prompt_files.examples(path, DataSpec(max_prompt=3), tokenizer)


def test_a_prompt_that_the_template_refuses_names_file_and_line(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
    with pytest.raises(ValueError, match=r"p\.jsonl:1: no tools"):
        prompt_files.examples(path, DataSpec(), tokenizer)


def test_digest_tells_data_apart():
    assert prompt_files.digest(some(3)) == prompt_files.digest(some(3))
    assert (
        len(
            {
                prompt_files.digest(some(3)),
                prompt_files.digest(some(4)),
                prompt_files.digest(some(3, length=2)),
            }
        )
        == 3
    )


# Batching


def test_an_epoch_shows_every_prompt_once_and_the_next_in_another_order():
    drawn = batches.pipeline(some(12), batch=4, seed=0)
    epochs = [[i for _ in range(3) for i in indices(next(drawn))] for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_alone():
    orders = [
        [indices(b) for b in batches.pipeline(some(12), batch=4, seed=seed, epochs=2)]
        for seed in (7, 7, 8)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffle_the_file_order_is_kept():
    drawn = batches.pipeline(some(4), batch=2, seed=0, shuffle=False, epochs=2)
    assert [indices(b) for b in drawn] == [[0, 1], [2, 3]] * 2


def test_batches_are_full_and_the_remainder_changes_with_the_epoch():
    drawn = list(batches.pipeline(some(10), batch=4, seed=0, epochs=5))
    assert [len(b.examples) for b in drawn] == [4] * 10
    seen = [{i for b in drawn[e : e + 2] for i in indices(b)} for e in range(0, 10, 2)]
    assert all(len(epoch) == 8 for epoch in seen)
    assert set.union(*seen) == set(range(10))


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7])
def test_state_round_trips_through_json_at_any_point(steps):
    whole = [indices(b) for b in batches.pipeline(some(10), batch=3, seed=5, epochs=4)]
    first = batches.pipeline(some(10), batch=3, seed=5, epochs=4)
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    resumed = batches.pipeline(some(10), batch=3, seed=5, epochs=4)
    next(resumed)
    resumed.set_state(state)
    assert [indices(b) for b in resumed] == whole[steps:]
    assert [indices(b) for b in first] == whole[steps:]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_split_the_batches_that_one_process_would_see(count):
    rows = [prompt_files.Example((1,) * (1 + i % 5), None, "", i) for i in range(13)]
    whole = list(batches.pipeline(rows, batch=4, seed=2, epochs=2))
    parts = [
        list(
            batches.pipeline(
                rows, batch=4, seed=2, epochs=2, process_index=index, process_count=count
            )
        )
        for index in range(count)
    ]
    assert {len(part) for part in parts} == {len(whole)} == {6}
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert [i for share in shares for i in indices(share)] == indices(batch)
        assert {share.longest for share in shares} == {max(len(r.ids) for r in batch.examples)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 5}, "4 prompts for a batch of 5"),
        ({"batch": 0}, "a batch of 0 prompts"),
        ({"batch": 3, "process_count": 2}, "a batch of 3 prompts for process 0 of 2"),
        ({"batch": 2, "process_count": 2, "process_index": 2}, "process 2 of 2"),
    ],
)
def test_pipeline_refuses_batches_that_cannot_be_filled(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches.pipeline(some(4), seed=0, **arguments)


# Padding


def test_pad_fills_on_the_left():
    prompt = batches.pad([[5], [6, 7, 8]], 3, pad_id=0)
    np.testing.assert_array_equal(prompt.ids_BP, [[0, 0, 5], [6, 7, 8]])
    np.testing.assert_array_equal(prompt.start_B, [2, 0])
    assert prompt.ids_BP.dtype == prompt.start_B.dtype == np.int32


@pytest.mark.parametrize("ids", [[[]], [[1, 2, 3, 4]]])
def test_pad_refuses_what_does_not_fit(ids):
    with pytest.raises(ValueError, match=f"prompt 0 has {len(ids[0])} ids and the width is 3"):
        batches.pad(ids, 3, pad_id=0)


# Completions


LIMITS = Limits(8, (0,))


def completed(tmp_path, tokenizer, *rows, limits=LIMITS, spec=DataSpec()):  # noqa: B008
    path = write(tmp_path / "c.jsonl", [{"prompt": "ab"} | row for row in rows])
    return prompt_files.examples(path, spec, tokenizer, limits=limits)


def texts(*given):
    return [{"completion": text} for text in given]


def test_texts_end_in_one_stop_id(tokenizer, tmp_path):
    rows, counts = completed(tmp_path, tokenizer, *texts("xy", "z<eos>"))
    assert [row.completion for row in rows] == [
        (*tokenizer.encode("xy"), 0),
        (*tokenizer.encode("z"), 0),
    ]
    assert all(row.is_whole for row in rows)
    assert counts == prompt_files.Counts(kept=2)


def test_ids_are_taken_as_they_are(tokenizer, tmp_path):
    given = [
        {"prompt": None, "prompt_ids": [9, 8], "completion_ids": [5, 6, 0]},
        {"completion_ids": [5, 6]},
        {"completion_ids": [7] * 8 + [0]},
    ]
    rows, counts = completed(tmp_path, tokenizer, *given)
    assert rows[0].ids == (9, 8)
    assert [row.completion for row in rows] == [(5, 6, 0), (5, 6), (7,) * 8]
    assert [row.is_whole for row in rows] == [True, False, False]
    assert counts == prompt_files.Counts(kept=3, cut=2)
    assert "2 with a completion that its length cuts" in str(counts)


def test_ids_beside_their_text(tokenizer, tmp_path):
    same = {"completion": "xy", "completion_ids": [*tokenizer.encode("xy"), 0]}
    same |= {"prompt_ids": tokenizer.encode("ab")}
    rows, _ = completed(tmp_path, tokenizer, same)
    assert rows[0].text == "ab"
    for change, part in (
        ({"completion": "xz"}, r"c.jsonl:1: completion_ids spell 'xy' and completion is 'xz'"),
        ({"prompt": "ba"}, r"c.jsonl:1: prompt_ids spell 'ab' and prompt is 'ba'"),
    ):
        with pytest.raises(ValueError, match=part):
            completed(tmp_path, tokenizer, same | change)


def test_a_text_is_tokenised_behind_its_prompt():
    """A token across the border would not be sampled; one that only follows a text would."""
    vocab = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "_b": 6, "_": 7}
    backend = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c")]))
    both = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    limits = Limits(8, (0,))

    def ids(prompt, text):
        record = prompt_files.Record(prompt, None, text, 1)
        return completions.ids_of(record, both.encode(prompt), both, limits, 0)[0]

    assert ids("a", "bc") == (5, 0)  # ab + c is not what follows a
    assert ids("ab", "bc") == (5, 0)
    assert ids("c", "a") == (1, 0)


def test_a_chat_ends_as_its_template_ends_a_turn(tokenizer, tmp_path):
    both = copy.deepcopy(tokenizer)
    both.add_special_tokens({"additional_special_tokens": ["<end>"]})
    both.chat_template = (
        "{% for m in messages %}{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    end = both.convert_tokens_to_ids("<end>")
    chat = {"prompt": [{"role": "user", "content": "ab"}], "completion": "x"}
    limits = Limits(8, (0, end))
    rows, _ = completed(tmp_path, both, chat, {"completion": "x"}, limits=limits)
    assert [row.completion for row in rows] == [(*both.encode("x"), end), (*both.encode("x"), 0)]
    # A reply as the last message is a completion, too.
    turns = {"messages": [*chat["prompt"], {"role": "assistant", "content": "x"}], "prompt": None}
    rows, _ = completed(tmp_path, both, turns, limits=limits)
    assert rows[0].completion == (*both.encode("x"), end)
    assert rows[0].ids == (*both.encode("ab<end>\n>"),)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({}, "c.jsonl:2: no `completion` and no `completion_ids`.*data.columns.completion=NAME"),
        ({"completion": " "}, "c.jsonl:2: `completion` is the string ' ': expected a string with"),
        ({"completion_ids": []}, "c.jsonl:2: `completion_ids` is an empty list: expected a list"),
        (
            {"completion_ids": [1, True]},
            r"c.jsonl:2: `completion_ids\[1\]` is True: expected a token",
        ),
        ({"completion_ids": [-1]}, r"c.jsonl:2: `completion_ids\[0\]` is -1: expected a token id"),
        (
            {"completion_ids": [999, 0]},
            "c.jsonl:2: completion_ids has the id 999: expected ids below",
        ),
        (
            {"completion_ids": [1, 0, 2]},
            "c.jsonl:2: the completion has the stop id 0 '<eos>' as its 2",
        ),
        ({"completion": "x<eos>y"}, "c.jsonl:2: the completion has the stop id 0 '<eos>' as its 2"),
        ({"prompt": None, "completion": "x"}, "c.jsonl:2: found neither among keys"),
        ({"prompt": None, "prompt_ids": [999], "completion": "x"}, "prompt_ids has the id 999"),
    ],
)
def test_what_cannot_be_imitated_is_named(tokenizer, tmp_path, row, part):
    with pytest.raises(ValueError, match=part):
        completed(tmp_path, tokenizer, {"completion": "x"}, row)


def test_completions_may_be_absent_where_they_are_not_read(tokenizer, tmp_path):
    path = write(tmp_path / "c.jsonl", [{"prompt": "a", "response": "x"}, {"prompt": "b"}])
    named = DataSpec(columns=(("completion", "response"),))
    assert len(prompt_files.examples(path, named, tokenizer)[0]) == 2
    path = write(tmp_path / "d.jsonl", [{"prompt": "a"}])
    assert prompt_files.examples(path, named, tokenizer)[0][0].completion == ()
    with pytest.raises(ValueError, match=r"no row has .response., which data.columns names as"):
        prompt_files.examples(path, named, tokenizer, limits=LIMITS)


def test_ids_count_beside_a_file_with_other_names(tokenizer, tmp_path):
    """One config reads what generate wrote to train on, and the held-out prompts as they come."""
    named = DataSpec(columns=(("prompt", "question"), ("answer", "gold")), system="s")
    given = {"prompt_ids": tokenizer.encode("ab"), "completion_ids": [5, 0], "answer": "1"}
    rows, _ = completed(tmp_path, tokenizer, given, spec=named)
    assert rows[0].ids == (*tokenizer.encode("ab"),)
    path = write(tmp_path / "h.jsonl", [{"question": "ab", "gold": "1"}])
    held, _ = prompt_files.examples(path, named, tokenizer)
    assert (held[0].text, held[0].answer) == ("sab>", "1")
    with pytest.raises(ValueError, match="found neither"):
        completed(tmp_path, tokenizer, {"completion": "x"}, spec=named)


def test_limits_and_tokenizers_that_end_nothing_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="at most 0 ids"):
        Limits(0, (0,))
    mute = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="the EOS id is None and the stop ids"):
        completed(tmp_path, mute, *texts("x"), limits=Limits(8, (1, 2)))
    rows, _ = completed(tmp_path, mute, *texts("x"), limits=Limits(8, (250,)))
    assert rows[0].completion[-1] == 250


def test_pad_completions_masks_the_completion_and_its_eos():
    rows = [
        prompt_files.Example((5,), None, "", 0, (7, 0)),
        prompt_files.Example((5, 6), None, "", 1, (8, 9), is_whole=False),
    ]
    batch = batches.pad_completions(rows, 2, 4, pad_id=0)
    np.testing.assert_array_equal(batch.ids_BT, [[0, 5, 7, 0, 0, 0], [5, 6, 8, 9, 0, 0]])
    np.testing.assert_array_equal(batch.mask_BT, [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.start_B, [1, 0])
    np.testing.assert_array_equal(batch.truncated_B, [False, True])
    assert not batch.logp_BT.any()
    assert batch.policy_step == -1
    assert batch.mask_BT.dtype == batch.truncated_B.dtype == bool
    assert batch.logp_BT.dtype == np.float32


@pytest.mark.parametrize("completion", [(), (1, 2, 3)])
def test_pad_completions_refuses_what_does_not_fit(completion):
    with pytest.raises(ValueError, match=f"completion of {len(completion)} ids: expected 1 to 2"):
        batches.pad_completions(
            [prompt_files.Example((5,), None, "", 0, completion)], 2, 2, pad_id=0
        )
