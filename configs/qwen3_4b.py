"""Qwen3-4B learns from a larger Qwen3, with answers of 8,192 tokens, on sixteen accelerators.

    opd-jax plan --config=configs/qwen3_4b.py:teacher=Qwen3-32B --topology=v5p:2x2x4
    opd-jax train --config=configs/qwen3_4b.py:teacher=Qwen3-8B --workdir=runs/qwen3-4b

It is the setting whose plan README and LOG.md give: estimated by a compiler, run nowhere. Both
models and the optimizer lie split over all devices; to sample, the student is split over four.

Arguments:
  teacher    Qwen3-8B, Qwen3-14B, Qwen3-32B or Qwen3-30B-A3B; a folder of that name in ``models``
  prompts    to train on
  devices    how many there are: 4, 8, 16, 32 or 64
"""

from opd_jax import config
from opd_jax.spec import ConfigError


def get_config(arg: str = ""):
    """Return the config."""
    args = config.parse_arg(arg, teacher="Qwen3-8B", prompts="prompts.jsonl", devices=16)
    if args.devices not in (4, 8, 16, 32, 64):
        raise ConfigError(
            f"devices is {args.devices}: expected 4, 8, 16, 32 or 64, which divide 64 prompts; "
            "set :devices="
        )
    c = config.defaults()
    c.student.path, c.teacher.path = "models/Qwen3-4B", f"models/{args.teacher}"
    c.student.remat = c.teacher.remat = "full"
    c.data.prompts, c.data.max_prompt = args.prompts, 800
    c.rollout.samples, c.rollout.max_new = 4, 8192
    c.train.prompts, c.train.steps = 64, 150
    c.train.microbatches = 256 // args.devices  # of one row a device
    c.eval.every = 0
    c.mesh.data, c.mesh.fsdp, c.mesh.rollout_model = 1, args.devices, 4
    return c
