"""Qwen2.5-1.5B-Instruct teaches Qwen2.5-0.5B-Instruct on GSM8K: a setting for one GPU of 24 GB.

    hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir=models/Qwen2.5-0.5B-Instruct
    hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir=models/Qwen2.5-1.5B-Instruct
    opd-jax train --config=configs/gsm8k_qwen.py --workdir=runs/gsm8k

and in two stages:

    opd-jax generate --model=models/Qwen2.5-1.5B-Instruct --prompts=gsm8k/train.jsonl \\
        --columns='{"prompt": "question"}' --system="$(cat gsm8k/system.txt)" \\
        --out=runs/gsm8k-answers.jsonl --max-new=400 --temperature=0.7 --top-p=0.95
    opd-jax train --config=configs/gsm8k_qwen.py:stage=1 --workdir=runs/gsm8k-stage1
    opd-jax train --config=configs/gsm8k_qwen.py:stage=2 --workdir=runs/gsm8k-stage2

``gsm8k/train.jsonl`` and ``test.jsonl`` are the data set's own files (``question``, and ``answer``
with its ``#### 18``), ``gsm8k/system.txt`` holds ``SYSTEM`` below.

What was chosen, and why: both models share a tokenizer, and the student has much to learn (Qwen's
technical report has 49.6 % and 73.2 % on GSM8K). The rates of both stages are five times those of
arXiv 2605.09253, app. B, whose student is eight times as large; the rest is that paper's. Not run
here, where there is no GPU, so that no result is promised.

Arguments:
  stage    0: on-policy alone; 1: off-policy; 2: on-policy from stage 1
  answers  what ``opd-jax generate`` wrote, for stage 1
  first    the run of stage 1, for stage 2
  steps    optimizer steps of a stage
"""

from opd_jax import config
from opd_jax.spec import ConfigError

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def get_config(arg: str = ""):
    """Return the config of one stage."""
    args = config.parse_arg(
        arg,
        stage=0,
        answers="runs/gsm8k-answers.jsonl",
        first="runs/gsm8k-stage1",
        steps=200,
    )
    if args.stage not in (0, 1, 2):
        raise ConfigError(f"stage is {args.stage}: expected 0, 1 or 2; set :stage=0")
    c = config.defaults()
    c.student.path = "models/Qwen2.5-0.5B-Instruct"
    c.teacher.path = "models/Qwen2.5-1.5B-Instruct"
    c.student.dtype = c.teacher.dtype = "bfloat16"
    c.student.remat = "full"
    c.data.prompts, c.data.heldout = "gsm8k/train.jsonl", "gsm8k/test.jsonl"
    c.data.columns = (("prompt", "question"),)
    c.data.system = SYSTEM
    c.data.max_prompt, c.rollout.max_new = 256, 400
    c.train.steps = args.steps
    c.train.prompts, c.rollout.samples = 16, 4
    c.train.microbatches = 8
    c.optim.lr = 1e-5
    c.eval.every, c.eval.prompts, c.eval.kl_prompts, c.eval.batch = 50, 256, 64, 64
    c.checkpoint.every = 50
    if args.stage == 1:
        c.data.prompts = args.answers
        c.train.stage = "off_policy"
        c.kl.direction, c.kl.ce = "forward", 0.5
        c.optim.lr = 1e-4
    elif args.stage == 2:
        c.init_from = args.first
    return c
