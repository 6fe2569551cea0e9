"""Adapters in PEFT's layout: a folder with ``adapter_config.json``, ``adapter_model.safetensors``.

``peft`` holds A as [rank, inputs] and B as [outputs, rank], named by the module that they adapt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax import mesh as meshlib
from opd_jax import processes
from opd_jax.files import new_folder
from opd_jax.models import hf, hf_folder, lora
from opd_jax.models.architecture import ModelConfig, layers_with
from opd_jax.models.architecture import specs as model_specs
from opd_jax.models.families import FAMILIES, Row
from opd_jax.models.lora import LoraSpec
from opd_jax.pytrees import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PART = "base_model.model.{}.lora_{}.weight"


def save(
    path, cfg: ModelConfig, spec: LoraSpec, adapters: Params, base: str, *, source, card: str
) -> None:
    """Write a folder with the adapters of a model; every process must call this.

    The folder appears whole or not at all, with the tokenizer files of ``source`` in it.

    Args:
      path: a folder that does not exist yet, or is empty.
      cfg: the model.
      spec: which adapters it has.
      adapters: ``lora.trained`` of its parameters, on any devices.
      base: name of the model that they belong to.
      source: Hugging Face folder of that model.
      card: text of ``README.md``.

    Raises:
      FileExistsError, OSError, ProcessesError: as ``hf.save``.
      ValueError: adapters on dense layers of a model that has experts too.
    """
    _check(cfg, spec)
    tensors = _tensors(cfg, spec, adapters)

    def write() -> None:
        with new_folder(Path(path).expanduser()) as folder:
            hf_folder.copy_tokenizer(Path(source), folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            hf_folder.write_json(folder / CONFIG, _config(cfg, spec, base))
            hf.write_shard(folder / WEIGHTS, tensors, beside=CONFIG)

    processes.on_first(write)


def _check(cfg: ModelConfig, spec: LoraSpec) -> None:
    names = sorted({name for row in _rows(cfg, spec).values() for _, name in _modules(cfg, row)})
    dense = [name for name in names if ".mlp." in name]
    if cfg.experts is not None and dense:
        raise ValueError(
            f"adapters on {dense[0]} beside layers of experts: expected them on attention alone, "
            "since peft takes the names of dense layers for experts and adds adapters to these; "
            "export the merged model (leave --adapter out), or train with "
            "--config.lora.targets=q_proj,k_proj,v_proj,o_proj"
        )


def _tensors(cfg: ModelConfig, spec: LoraSpec, adapters: Params) -> dict[str, np.ndarray]:
    found = {}
    for leaf, row in _rows(cfg, spec).items():
        pair = meshlib.to_host(adapters["layers"][leaf])
        for at, module in _modules(cfg, row):
            a_IR = pair["a"][at].reshape(-1, spec.rank)
            b_RO = pair["b"][at].reshape(spec.rank, -1)
            found[_PART.format(module, "A")] = np.ascontiguousarray(a_IR.T)
            found[_PART.format(module, "B")] = np.ascontiguousarray(b_RO.T)
    return found


def _rows(cfg: ModelConfig, spec: LoraSpec) -> dict[str, Row]:
    """The tensors that have adapters, by leaf."""
    leaves = lora.targets(cfg, spec).values()
    return {row.leaf[-1]: row for row in FAMILIES[cfg.model_type].rows if row.leaf[-1] in leaves}


def _modules(cfg: ModelConfig, row: Row) -> Iterator[tuple[int, str]]:
    """Index into the layers of a leaf, and the module that it is the weight of."""
    leaf = row.leaf[-1]
    named = row.names(model_specs(cfg)["layers"][leaf], layers_with(cfg, leaf))
    for (at,), name in named.items():
        yield at, name.removesuffix(".weight")


def _config(cfg: ModelConfig, spec: LoraSpec, base: str) -> dict[str, Any]:
    rows = _rows(cfg, spec)
    names = [row.name.split(".")[-2] for row in rows.values()]
    if cfg.experts is not None:  # whose modules may have the same names
        names = [name for row in rows.values() for _, name in _modules(cfg, row)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(names),
    }
