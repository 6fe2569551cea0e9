"""A real model on prompts that it half solves: SmolLM2-135M-Instruct teaches a pruned copy sums.

    python scripts/fetch_smollm2.py --out=models/SmolLM2-135M-Instruct
    python scripts/fetch_smollm2.py --out=models/SmolLM2-135M-pruned --drop-layers=3,13,14,17,25,26
    python scripts/make_sum_prompts.py --out=runs/sums
    opd-jax train --config=configs/smollm2_sums.py --workdir=runs/sums-opd

Arguments: ``configs/smollm2_sums.py:steps=60,lr=1e-4``; ``stage=1,answers=FILE`` imitates the
teacher's answers that ``opd-jax generate`` wrote, ``first=RUN`` goes on from the weights of a run.
Arms: ``configs/opd.py:base=configs/smollm2_sums.py,rocks=DIR``.
"""

from opd_jax import config


def get_config(arg: str = ""):
    """Return the config; sized for two CPU cores."""
    args = config.parse_arg(arg, steps=60, lr=1e-4, stage=2, answers="", first="")
    c = config.defaults()
    c.student.path = "models/SmolLM2-135M-pruned"
    c.teacher.path = "models/SmolLM2-135M-Instruct"
    c.data.prompts = "runs/sums/train.jsonl"
    c.data.heldout = "runs/sums/heldout.jsonl"
    c.data.max_prompt = 96
    c.rollout.samples = 2
    c.rollout.max_new = 32
    c.train.steps = args.steps
    c.train.prompts = 4
    c.optim.lr = args.lr
    c.optim.warmup = 0.1
    c.eval.every = args.steps
    c.eval.prompts = 96
    c.eval.kl_prompts = 32
    c.eval.batch = 32
    c.eval.grader = "scripts/last_number.py:last_number"
    c.checkpoint.every = 0
    c.log.samples_every = 20
    c.init_from = args.first
    if args.stage == 1:
        c.train.stage = "off_policy"
        c.data.prompts = args.answers
    return c
