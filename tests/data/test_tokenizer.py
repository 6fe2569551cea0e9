"""Tokenizers: loading, rendering, stop ids and equality, on small real BPE tokenizers."""

import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from opd_jax.data import tokenizer as tok

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking is defined %}"
    "<think>{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]


def build(text="the answer is 42\n", *, template=TEMPLATE, eos="<|im_end|>", pad=None, added=()):
    """A trained byte-level BPE with chat tokens, as Qwen's and SmolLM2's are."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [text] * 8,
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build()


def test_load_reads_back_what_was_saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = tok.load(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert tok.render(loaded, MESSAGES) == tok.render(tokenizer, MESSAGES)


def test_load_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*set the model's path"):
        tok.load(tmp_path / "nowhere")


def test_load_lists_what_is_there_instead_of_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json .*found config\.json"):
        tok.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{oops", "{}", '{"model": {"type": "Nonsense"}}'])
def test_load_refuses_a_corrupt_tokenizer(tokenizer, tmp_path, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read.*copy them again"):
        tok.load(tmp_path)


def test_render_applies_the_template_and_opens_the_assistant_turn(tokenizer):
    ids = tok.render(tokenizer, MESSAGES)
    assert all(type(i) is int for i in ids)
    expected = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected


def test_render_passes_template_arguments(tokenizer):
    assert tokenizer.decode(tok.render(tokenizer, MESSAGES, thinking=True)).endswith("<think>")


def test_render_encodes_a_plain_prompt_as_it_is():
    tokenizer = build(template=None)
    assert tokenizer.decode(tok.render(tokenizer, " 2 +  2 =")) == " 2 +  2 ="


def test_render_writes_one_bos_whether_or_not_the_prompt_has_it():
    tokenizer = build()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = tok.render(tokenizer, "42")
    assert plain[0] == 0
    assert plain.count(0) == 1
    assert tok.render(tokenizer, "<|endoftext|>42") == plain


def test_render_refuses_messages_without_a_template():
    with pytest.raises(
        ValueError, match=r"1 chat messages.*no chat template.*chat_template\.jinja"
    ):
        tok.render(build(template=None), MESSAGES)


def test_render_refuses_an_empty_prompt(tokenizer):
    with pytest.raises(ValueError, match="renders to no ids"):
        tok.render(tokenizer, "")


def test_pad_id_is_pad_else_eos():
    assert tok.pad_id(build(pad="<|endoftext|>")) == 0
    assert tok.pad_id(build()) == 2
    with pytest.raises(ValueError, match="neither a pad nor an EOS"):
        tok.pad_id(build(eos=None))


def test_stop_ids_join_tokenizer_and_generation_config(tokenizer):
    assert tok.stop_ids(tokenizer, None) == (2,)
    assert tok.stop_ids(tokenizer, 0) == (0, 2)
    assert tok.stop_ids(tokenizer, [5, 2]) == (2, 5)
    with pytest.raises(ValueError, match="no EOS id"):
        tok.stop_ids(build(eos=None), None)


def test_stop_set_says_how_base_and_instruct_models_differ(tokenizer):
    base = build(eos="<|endoftext|>")
    ids, message = tok.stop_set(base, None, tokenizer, (2,))
    assert ids == (0, 2)
    assert message is not None
    assert "student 0 '<|endoftext|>'" in message
    assert "teacher 2 '<|im_end|>'" in message
    assert tok.stop_set(tokenizer, None, tokenizer, 2) == ((2,), None)


def test_compare_accepts_padded_rows(tokenizer):
    size = len(tokenizer)
    assert tok.compare(tokenizer, build(), size + 8, size + 136) == size
    assert tok.compare(tokenizer, tokenizer, size, size) == size


def test_compare_counts_added_tokens():
    ours, theirs = build(added=["<think>"]), build(added=["<think>"])
    assert tok.compare(ours, theirs, 400, 300) == len(build()) + 1


def test_compare_names_the_first_differing_id(tokenizer):
    other = build("hello world again\n")
    names = [{i: t for t, i in x.get_vocab().items()} for x in (tokenizer, other)]
    first = next(i for i in range(280) if names[0].get(i) != names[1].get(i))
    with pytest.raises(ValueError, match="tokenizers differ") as error:
        tok.compare(tokenizer, other, 400, 400)
    assert f"{len(tokenizer)} and {len(other)} ids, first at id {first}:" in str(error.value)
    assert repr(names[0][first]) in str(error.value)
    assert repr(names[1][first]) in str(error.value)


def test_compare_refuses_one_more_added_token(tokenizer):
    more, size = build(added=["<think>"]), len(tokenizer)
    with pytest.raises(ValueError, match=f"{size} and {size + 1} ids, first at id {size}.*nothing"):
        tok.compare(tokenizer, more, 400, 400)


def test_compare_refuses_fewer_rows_than_ids(tokenizer):
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"teacher has {size - 1} output rows.*{size} ids"):
        tok.compare(tokenizer, tokenizer, size, size - 1)


def test_check_render_accepts_equal_templates(tokenizer):
    tok.check_render(tokenizer, build(), MESSAGES)
    tok.check_render(tokenizer, build(), "plain")


def test_check_render_shows_both_prompts_and_the_first_difference(tokenizer):
    other = build(template=TEMPLATE.replace("assistant", "model"))
    with pytest.raises(ValueError, match="different ids") as error:
        tok.check_render(tokenizer, other, MESSAGES)
    ours, theirs = tok.render(tokenizer, MESSAGES), tok.render(other, MESSAGES)
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    for part in (f"position {first}", "<|im_start|>assistant", "<|im_start|>model", "--- teacher"):
        assert part in str(error.value)


def test_check_render_refuses_a_prompt_that_only_goes_on_longer(tokenizer):
    longer = build(template=TEMPLATE.replace("assistant\n", "assistant\n42"))
    with pytest.raises(ValueError, match="student the end, teacher"):
        tok.check_render(tokenizer, longer, MESSAGES)


def test_a_tokenizer_without_a_template_takes_the_others(tokenizer):
    bare = build(template=None)
    assert tok.lend_template(bare, tokenizer)
    assert tok.render(bare, MESSAGES) == tok.render(tokenizer, MESSAGES)
    own = build(template="{{ messages[0].content }}")
    assert not tok.lend_template(own, tokenizer)
    assert own.chat_template == "{{ messages[0].content }}"
    assert not tok.lend_template(build(template=None), build(template=None))


def test_check_render_says_whose_template_is_missing(tokenizer):
    with pytest.raises(ValueError, match=r"student's tokenizer cannot render.*no chat template"):
        tok.check_render(build(template=None), tokenizer, MESSAGES)


def test_token_text_makes_whitespace_and_stray_bytes_visible(tokenizer):
    assert tok.token_text(tokenizer, tokenizer.get_vocab()["Ġanswer"]) == "␣answer"
    shown = [tok.token_text(tokenizer, i) for i in tokenizer.encode(" \n\té\x00")]
    assert shown == ["␣", "⏎", "⇥", "<0xC3>", "<0xA9>", "<U+0000>"]
    assert tok.token_text(tokenizer, 2) == "<|im_end|>"
    assert tok.token_text(tokenizer, len(tokenizer) + 5) == f"<unused {len(tokenizer) + 5}>"
    assert tok.token_text(tokenizer, -1) == "<unused -1>"


def test_token_text_keeps_the_space_of_sentencepiece_tokens():
    backend = Tokenizer(models.WordLevel({"▁the": 0, "s": 1}, unk_token="s"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tok.token_text(tokenizer, 0) == "␣the"
    assert tok.token_text(tokenizer, 1) == "s"


def test_token_text_tells_all_ids_apart(tokenizer):
    texts = [tok.token_text(tokenizer, i) for i in range(len(tokenizer))]
    assert len(set(texts)) == len(texts)


def test_importing_says_nothing():
    """transformers would announce that torch is missing, which is as it should be."""
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    command = [sys.executable, "-c", "import opd_jax.data.tokenizer"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
