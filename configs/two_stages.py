"""Two stages on the embedded pair: imitate the teacher's answers, then distil on-policy.

    opd-jax generate --model=embedded:teacher --prompts=embedded:prompts/train.jsonl \\
        --out=runs/answers.jsonl --max-new=56 --temperature=1
    opd-jax train --config=configs/two_stages.py:stage=1 --workdir=runs/stage1
    opd-jax train --config=configs/two_stages.py:stage=2 --workdir=runs/stage2

Stage 1 trains on ``runs/answers.jsonl`` by half the forward KL and half the cross-entropy, stage 2
on the student's own answers by the reverse KL, from the weights of stage 1: the recipe of arXiv
2605.09253, app. B.

Expected of one seed, 1,920 answers (--limit=1920) and 60 + 60 steps: 71.5 % of 256 held-out
problems and 0.850 nats after stage 1, 64.8 % and 0.172 nats after stage 2; 59.4 % and 0.200 nats
by 120 steps of configs/demo.py, on-policy alone (LOG.md). Two to six minutes a stage on two CPU
cores.

Arguments:
  stage    1 or 2
  answers  what ``opd-jax generate`` wrote, for stage 1
  first    the run of stage 1, RUN or RUN@STEP, for stage 2
  base     whose models, prompts and sizes: demo, smollm2, or the path of another config file
  steps    optimizer steps of the stage; 0: half of the base's
  lr       its peak learning rate; 0: the base's
"""

import runpy
from pathlib import Path

from opd_jax import config
from opd_jax.spec import ConfigError


def get_config(arg: str = ""):
    """Return the config of one stage."""
    args = config.parse_arg(
        arg,
        stage=1,
        answers="runs/answers.jsonl",
        first="runs/stage1",
        base="demo",
        steps=0,
        lr=0.0,
    )
    if args.stage not in (1, 2):
        raise ConfigError(f"stage is {args.stage}: expected 1 or 2; set :stage=1")
    beside = Path(__file__).parent / f"{args.base}.py"
    c = runpy.run_path(str(beside if beside.is_file() else args.base))["get_config"]()
    c.train.steps = args.steps or max(c.train.steps // 2, 1)
    c.optim.lr = args.lr or c.optim.lr
    if args.stage == 1:
        c.data.prompts = args.answers
        c.train.stage = "off_policy"
        c.kl.direction, c.kl.ce = "forward", 0.5
    else:
        c.init_from = args.first
    return c
