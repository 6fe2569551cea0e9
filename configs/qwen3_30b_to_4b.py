"""The published setting: Qwen3-30B-A3B teaches Qwen3-4B, off-policy first and on-policy after.

    opd-jax generate --model=models/Qwen3-30B-A3B-Instruct-2507 --prompts=openthoughts3_20k.jsonl \\
        --out=runs/qwen3/answers.jsonl --max-new=16384 --temperature=0.6 --top-p=0.95 \\
        --mesh-model=4
    opd-jax train --config=configs/qwen3_30b_to_4b.py:stage=1 --workdir=runs/qwen3/stage1
    opd-jax train --config=configs/qwen3_30b_to_4b.py:stage=2 --workdir=runs/qwen3/stage2

Every number is that of arXiv 2605.09253 (app. B; "paper" below), or the default of the framework
that it was run with where the paper is silent (KDFlow's training and distillation arguments;
"KDFlow"). What is ours is marked so. Sized for four accelerators of 80 GB, as the paper's; not run
here, where there are none. Compiled for four CPU devices, which are no GPUs, the update takes 41
GiB of each in stage 2, but 77 GiB in stage 1, whose rows of 16,384 leave no room to spare:

    opd-jax plan --config=configs/qwen3_30b_to_4b.py:stage=1 --topology=cpu:4 --only=train \\
        --student-config=Qwen3-4B --teacher-config=Qwen3-30B-A3B

Not the paper's: it splits the batch and the parameters (FSDP2) and long rows (ring attention), here
the devices split heads, experts and the vocabulary, since one prompt a step does not divide over
four; its stage 1 packs several answers into a row, here a row holds one; its code appends an end to
answers that were cut, here they stay cut (the ids say which are whole).

Arguments:
  stage    1 (off-policy) or 2 (on-policy)
  answers  what ``opd-jax generate`` wrote, for stage 1
  prompts  10,000 prompts for stage 2, from position 20,000 of the data set on (paper)
  first    the run of stage 1, for stage 2; empty: from the student's own folder, as the published
           freezing scripts do
"""

from opd_jax import config
from opd_jax.spec import ConfigError


def get_config(arg: str = ""):
    """Return the config of one stage."""
    args = config.parse_arg(
        arg,
        stage=1,
        answers="runs/qwen3/answers.jsonl",
        prompts="openthoughts3_20k_30k.jsonl",
        first="runs/qwen3/stage1",
    )
    if args.stage not in (1, 2):
        raise ConfigError(f"stage is {args.stage}: expected 1 or 2; set :stage=1")
    c = config.defaults()
    c.seed = 42  # KDFlow
    c.student.path = "models/Qwen3-4B-Instruct-2507"  # paper
    c.teacher.path = "models/Qwen3-30B-A3B-Instruct-2507"  # paper
    c.student.dtype = c.teacher.dtype = "bfloat16"  # paper
    c.student.param_dtype = "float32"  # master weights, KDFlow
    c.student.remat = "full"  # gradient checkpointing, paper
    c.data.template = (("enable_thinking", False),)  # thinking off, paper
    c.data.epochs = 1  # paper
    c.kl.temperature = 1.0  # KDFlow
    c.optim.b1, c.optim.b2, c.optim.weight_decay = 0.9, 0.98, 0.0  # KDFlow
    c.optim.min_lr = 1e-8  # end of the cosine, KDFlow
    c.optim.warmup = 0.05  # paper
    c.optim.clip = 1.0  # paper
    c.checkpoint.every = 100  # ours
    c.mesh.model = 4  # heads, experts and the vocabulary split over the devices (ours, see above)
    if args.stage == 1:
        c.train.stage = "off_policy"  # 20,000 answers of the teacher, paper
        c.data.prompts = args.answers
        c.kl.direction, c.kl.ce = "forward", 0.5  # kd_ratio .5, paper
        c.optim.lr = 2e-5  # paper
        c.train.prompts, c.rollout.samples = 128, 1  # a batch of 128 answers, paper
        c.train.microbatches = 128  # of one row, paper
        c.data.max_prompt, c.rollout.max_new = 800, 15584  # together 16,384, paper; the split: ours
        c.train.steps = 20_000 // 128  # one epoch
    else:
        c.data.prompts = args.prompts
        c.kl.direction = "reverse"  # kd_ratio 1, paper
        c.optim.lr = 2e-6  # paper
        # Four answers to one prompt make the batch of 4, paper.
        c.train.prompts, c.rollout.samples = 1, 4
        c.train.microbatches = 4  # of one row, paper
        c.rollout.temperature, c.rollout.top_p = 1.0, 1.0  # paper
        c.data.max_prompt, c.rollout.max_new = 800, 8000  # paper
        c.train.steps = 10_000  # one epoch of 10,000 prompts, paper
        c.init_from = args.first
    return c
