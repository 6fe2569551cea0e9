"""``peft`` reads the adapters of a run to the logits of its merged export."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run
from adapters import FOLDERS, GOLDENS, SPEC, grown

from opd_jax import cli
from opd_jax.models import hf, lora, peft, transformer

pytestmark = [
    pytest.mark.ci,
    # Of peft's use of transformers. Tensors that are missing or too many are a UserWarning.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
tiny = tiny_run.tiny


def theirs(base, adapter, ids):
    """Logits of the base with the adapters that peft loads, unmerged, and merged by it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(model, adapter)
    ids = torch.tensor(ids).long()
    with torch.no_grad():
        apart = model(ids).logits.numpy()
        return apart, model.merge_and_unload()(ids).logits.numpy()


def test_peft_loads_what_a_run_exports(tiny, tmp_path, monkeypatch):
    tiny_run.use_one_device(monkeypatch)
    keys = {"lora__rank": 4, "lora__alpha": 6.0, "lora__rslora": True}
    keys |= {"lora__targets": "q_proj,o_proj,down_proj"}
    assert tiny_run.train(tiny, tmp_path / "run", **keys) == 0
    for name, flags in (("merged", []), ("adapter", ["--adapter"])):
        argv = ["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / name}", *flags]
        assert cli.main(argv) == 0
    ids = np.random.default_rng(0).integers(0, 600, (2, 9))
    cfg, tree = hf.load(tmp_path / "merged")
    ours = np.asarray(transformer.logits(tree, ids, cfg=cfg))
    plain = np.asarray(transformer.logits(hf.load(tiny / "student")[1], ids, cfg=cfg))
    assert np.abs(ours - plain).max() > 1e-2
    for logits in theirs(tiny / "student", tmp_path / "adapter", ids):
        np.testing.assert_allclose(logits, ours, atol=2e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_peft_loads_the_adapters_of_every_family(name, tmp_path):
    cfg, tree = hf.load(GOLDENS / name)
    spec = SPEC
    if cfg.experts is not None:  # more is refused, see test_lora
        spec = dataclasses.replace(SPEC, targets="q_proj,k_proj,v_proj,o_proj")
    with_adapters = grown(tree, cfg, spec)
    peft.save(tmp_path / "adapter", cfg, spec, lora.trained(with_adapters), name,
              source=GOLDENS / name, card="")  # fmt: skip
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
    ours = jax.jit(transformer.logits, static_argnames="cfg")(with_adapters, ids, cfg=cfg)
    for logits in theirs(GOLDENS / name, tmp_path / "adapter", ids):
        np.testing.assert_allclose(logits, ours, atol=2e-4, rtol=2e-4)
