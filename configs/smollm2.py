"""A real model: SmolLM2-135M-Instruct teaches a copy of itself without six of its 30 layers.

    python scripts/fetch_smollm2.py --out=models/SmolLM2-135M-Instruct
    python scripts/fetch_smollm2.py --out=models/SmolLM2-135M-pruned --drop-layers=3,13,14,17,25,26
    python scripts/make_reasoning_prompts.py --out=runs/prompts
    opd-jax train --config=configs/smollm2.py --workdir=runs/smollm2

Expected after its 40 steps: held-out KL 0.464 nats (before: 0.953, at step 20: 0.501). Accuracy
stays near 0 of 48: nearly every answer is cut at 64 tokens. About 21 minutes on two CPU cores with
other programs beside it, 11.7 s a step when alone (LOG.md, "SmolLM2-135M teaches a copy of
itself").

Arguments: ``configs/smollm2.py:steps=20,lr=5e-5``.
"""

from opd_jax import config


def get_config(arg: str = ""):
    """Return the config; sized for two CPU cores."""
    args = config.parse_arg(arg, steps=40, lr=1e-4)
    c = config.defaults()
    c.student.path = "models/SmolLM2-135M-pruned"
    c.teacher.path = "models/SmolLM2-135M-Instruct"
    c.data.prompts = "runs/prompts/train.jsonl"
    c.data.heldout = "runs/prompts/heldout.jsonl"
    c.data.max_prompt = 96
    c.rollout.samples = 2
    c.rollout.max_new = 64
    c.train.steps = args.steps
    c.train.prompts = 4
    c.optim.lr = args.lr
    c.optim.warmup = 0.1
    c.eval.every = 20
    c.eval.prompts = 48
    c.eval.kl_prompts = 48
    c.eval.batch = 16
    c.checkpoint.every = 20
    c.checkpoint.keep = 1
    c.log.samples_every = 20
    return c
