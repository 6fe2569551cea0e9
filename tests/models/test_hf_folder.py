"""Configs and tokenizer of a written folder: taken over from its source, or written for both."""

import json
import os

import hub_folders
import jax.numpy as jnp
import pytest

from opd_jax.data import tokenizer as tokenizers
from opd_jax.models import hf, hf_config

# Of ours, what says how the weights compute; all else is the source's.
SPELLINGS = {"rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype"}


@pytest.fixture(scope="module", params=sorted(hub_folders.FOLDERS))
def source(request, tmp_path_factory):
    """A folder as on the hub, with files that are no tokenizer's beside it."""
    folder = hub_folders.FOLDERS[request.param](tmp_path_factory.mktemp("hub") / "model", 0)
    for name in ("README.md", ".gitattributes", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_text("not a tokenizer")
    (folder / "added_tokens.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0b")
    return folder


def saved(source, out, **kwargs):
    cfg, tree = hf.load(source)
    hf.save(out, cfg, tree, source=source, **kwargs)
    return out


def files(folder) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


OURS = {"config.json", "generation_config.json", "model.safetensors"}


def test_tokenizer_files_are_those_of_the_source(source, tmp_path):
    found, given = files(saved(source, tmp_path / "out")), files(source)
    others = {"README.md", ".gitattributes", "pytorch_model.bin", "training_args.bin"}
    assert found.keys() == given.keys() - others
    for name in found.keys() - OURS:
        assert found[name] == given[name], name


def test_links_become_files(source, tmp_path):
    """As in the hub's download cache."""
    cache = tmp_path / "snapshots" / "0"
    for name, content in files(source).items():
        blob = tmp_path / "blobs" / name.replace("/", "-")
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(os.path.relpath(blob, (cache / name).parent))
    out = saved(cache, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert files(out) == files(saved(source, tmp_path / "plain"))
    (tmp_path / "blobs" / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is a link.*fetch it again"):
        saved(cache, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_no_file_is_no_tokenizers(source, tmp_path):
    os.mkfifo(source / "tokenizer.pipe")
    (source / "tokenizer.folder").mkdir()
    try:
        names = files(saved(source, tmp_path / "out")).keys()
    finally:
        os.remove(source / "tokenizer.pipe")
        (source / "tokenizer.folder").rmdir()
    assert not any("pipe" in name or "folder" in name for name in names)


def test_config_keeps_the_fields_of_the_source(source, tmp_path):
    out = saved(source, tmp_path / "out", dtype=jnp.bfloat16, eos_ids=(3, 7))
    given, found = (json.loads((x / "config.json").read_text()) for x in (source, out))
    ours = hf_config.config_json(hf.read_config(source), jnp.bfloat16)
    assert found == given | ours | {"eos_token_id": [3, 7]}
    changed = {name for name in found if found[name] != given.get(name)}
    assert changed <= SPELLINGS | {"eos_token_id"}
    assert found["bos_token_id"] == given["bos_token_id"]
    assert found["dtype"] == found["torch_dtype"] == "bfloat16"
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"]
    assert hf.read_config(out) == hf.read_config(source)


def test_generation_config_keeps_the_fields_of_the_source(source, tmp_path):
    out = saved(source, tmp_path / "out", eos_ids=(3, 7))
    given, found = (json.loads((x / "generation_config.json").read_text()) for x in (source, out))
    assert found == given | {"eos_token_id": [3, 7]}
    as_given = saved(source, tmp_path / "as-given")
    assert json.loads((as_given / "generation_config.json").read_text()) == given


def test_a_generation_config_is_made_where_there_is_none(source, tmp_path):
    (source / "generation_config.json").rename(source / "elsewhere")
    try:
        out = saved(source, tmp_path / "out", eos_ids=(5,))
    finally:
        (source / "elsewhere").rename(source / "generation_config.json")
    found = json.loads((out / "generation_config.json").read_text())
    config = json.loads((source / "config.json").read_text())
    assert found == {"bos_token_id": config["bos_token_id"], "eos_token_id": 5}


def test_a_tokenizer_in_memory_is_written_for_both_transformers(source, tmp_path):
    cfg, tree = hf.load(source)
    fast = tokenizers.load(source)
    hf.save(tmp_path / "out", cfg, tree, tokenizer=fast)
    raw = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert raw["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not raw.keys() & {"backend", "is_local", "local_files_only", "extra_special_tokens"}
    given = json.loads((source / "tokenizer_config.json").read_text())
    assert raw.get("additional_special_tokens") == given.get("additional_special_tokens")
    again = tokenizers.load(tmp_path / "out")
    text = "it's 3 apples <|im_start|> <tool_call> é"
    assert again.encode(text) == fast.encode(text)
    assert again.all_special_tokens == fast.all_special_tokens
    assert again.get_chat_template() == fast.get_chat_template()


def test_a_source_and_a_tokenizer_are_too_much(source, tmp_path):
    with pytest.raises(ValueError, match="both source and tokenizer"):
        saved(source, tmp_path / "out", tokenizer=tokenizers.load(source))
    assert not list(tmp_path.iterdir())
