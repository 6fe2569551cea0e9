"""A dense student of a teacher with experts, planned for a TPU and for GPUs that are not there.

The compilers for both run on any machine: libtpu, and the CUDA plugin of jax with ptxas and
libdevice (no GPU library that runs things). Widths are small and the vocabulary is a real one, so
what would go wrong at scale stands out in bytes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from opd_jax.models import grouped, hf_config, params, transformer
from opd_jax.plan import hlo, known_models

pytestmark = [pytest.mark.ci, pytest.mark.optimized]

VOCAB, PROMPTS, PROMPT, NEW = 151_936, 128, 128, 128
SAMPLES, PIECES, LAYERS = 2, 2, 3
MESH = {"data": 2, "fsdp": 2, "model": 2}
# Positions of a step, and of a micro-batch on one chip.
TOKENS = PROMPTS * SAMPLES * (PROMPT + NEW - 1)
LOCAL = TOKENS // PIECES // (MESH["data"] * MESH["fsdp"])
STUDENT = known_models.MODELS["Qwen3-0.6B"] | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEACHER = known_models.MODELS["Qwen3-30B-A3B"] | STUDENT
TEACHER |= {"model_type": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 4}
TEACHER |= {"moe_intermediate_size": 256, "tie_word_embeddings": False}
WIDTH, EXPERTS, TOP_K = (
    TEACHER[name] for name in ("hidden_size", "num_experts", "num_experts_per_tok")
)
PACKAGES = "scripts/requirements-ci-cuda.txt"
# The command, leaving behind the text of each program that it compiled.
COMMAND = """
import pathlib, sys
from opd_jax import cli
from opd_jax.plan import hlo

def kept(text, read=hlo.read):
    name = text.partition("HloModule ")[2].partition(",")[0]
    pathlib.Path(sys.argv[1], f"{name}.hlo").write_text(text)
    return read(text)

hlo.read = kept
sys.exit(cli.main(sys.argv[2:]))
"""


def environment(topology: str) -> dict[str, str]:
    """Of a process that compiles for a machine."""
    first = [os.getcwd()]
    found = os.environ | {"JAX_PLATFORMS": "cpu"}
    if topology.startswith("h100"):
        cuda = Path(os.environ.get("OPD_JAX_CUDA", ""))
        if not (cuda / "nvidia/cu13/bin/ptxas").exists() or not (cuda / "jax_plugins").exists():
            pytest.fail(
                f"OPD_JAX_CUDA is {os.environ.get('OPD_JAX_CUDA')!r}: expected a folder with what "
                f"compiles for GPUs; pip install --no-deps --target=FOLDER --requirement {PACKAGES}"
            )
        first.append(str(cuda))
        found["PATH"] = f"{cuda / 'nvidia/cu13/bin'}:{os.environ['PATH']}"
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (*first, os.environ.get("PYTHONPATH", ""))))
    return found


@pytest.fixture(scope="module", params=["v5p:2x2x2", "h100:8"])
def folder(request, tmp_path_factory):
    """What the command left of all programs of a step: ``plan.json``, ``PROGRAM.hlo``."""
    folder = tmp_path_factory.mktemp("plan")
    for name, fields in (("student", STUDENT), ("teacher", TEACHER)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields))
    tiny_run.write_lines(folder / "prompts.jsonl", [{"prompt": "1 + 1 = ?", "answer": "2"}])
    (folder / "config.py").write_text(tiny_run.CONFIG.format(folder=str(folder)))
    flags = {"data.max_prompt": PROMPT, "rollout.max_new": NEW, "student.remat": "full"}
    flags |= {"train.prompts": PROMPTS, "rollout.samples": SAMPLES, "train.microbatches": PIECES}
    flags |= {f"mesh.{axis}": size for axis, size in MESH.items()}
    argv = ["plan", f"--config={folder / 'config.py'}", f"--topology={request.param}"]
    argv += [f"--out={folder / 'plan.json'}", *(f"--config.{k}={v}" for k, v in flags.items())]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, folder, *argv],
        env=environment(request.param),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]  # it fits
    print(done.stdout)
    return folder


@pytest.fixture(scope="module")
def planned(folder):
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture(scope="module")
def teacher(folder):
    """The program that the compiler made of the teacher's pass."""
    return hlo.read((folder / "jit_teacher_states.hlo").read_text())


def test_every_program_of_a_step_compiles(planned):
    assert {*planned["programs"]} == {"prefill", "decode", "teacher", "train"}
    assert all(part["seconds"] > 0 for part in planned["programs"].values())
    assert all(part["fits"] for part in planned["programs"].values())


def test_experts_stay_where_they_are(planned):
    """Weights are gathered over fsdp alone, and states summed over model; no token travels."""
    found = planned["programs"]["teacher"]["collectives"]
    gathered = [c for c in found if c["kind"] == "all-gather"]
    assert {c["axes"] for c in gathered} == {"fsdp"}
    over_model = [c for c in found if "model" in c["axes"]]
    assert {c["kind"] for c in over_model} == {"all-reduce"}
    states = LOCAL * WIDTH * 4  # float32, as experts are summed; the rest is bfloat16
    assert max(c["bytes"] for c in over_model) <= states
    # Attention and experts of each layer, and the embeddings, in each micro-batch.
    assert 2 * LAYERS <= sum(c["count"] for c in over_model) / PIECES <= 2 * LAYERS + 2
    # Embeddings are looked up where the table's columns lie and exchanged; pairs of token and
    # expert would be as many times larger as a token has experts.
    exchanged = [c for c in found if c["kind"] == "all-to-all"]
    assert all(c["axes"] == "fsdp" and c["bytes"] <= states for c in exchanged)
    assert sum(c["count"] for c in exchanged) <= PIECES
    assert {c["kind"] for c in found} <= {"all-gather", "all-reduce", "all-to-all"}


def loops(program: hlo.Program) -> list[int | None]:
    """Rounds of every loop in it that the compiler counts."""
    everything = [op for ops in program.computations.values() for op in ops.values()]
    return [program.counted(op) for op in everything if op.kind == "while"]


def test_the_teachers_layers_are_one_loop(teacher):
    """A copy of it, for one more pass or the last round, would be compiled as well."""
    assert loops(teacher).count(LAYERS) == 1
    assert loops(teacher).count(PIECES) == 1


def test_no_expert_computes_tokens_of_others(planned):
    active = {"num_experts": TOP_K}
    dense = hf_config.parse_config(TEACHER | active, dtype="bfloat16")
    ideal = 2 * TOKENS * params.count(transformer.specs(dense)["layers"])
    flops = planned["programs"]["teacher"]["flops"]
    assert ideal < flops < 1.6 * ideal  # attention's own, and half blocks of rows at the ends


def test_the_compiled_program_multiplies_rows_by_their_own_expert(folder, planned, teacher):
    """A dense form would have products of all rows with all experts."""
    pairs, here = LOCAL * TOP_K, EXPERTS // MESH["model"]
    largest = max(a.num_bytes for _, op, _, _ in teacher.runs() for a in op.arrays)
    assert largest < 2 * pairs * WIDTH * here / 4  # of all pairs and experts, in bfloat16
    if planned["topology"] != "h100:8":  # a kernel of its own, whose work test_tpu.py looks at
        text = (folder / "jit_teacher_states.hlo").read_text()
        assert text.count('custom_call_target="tpu_custom_call"') >= 3
        return
    products = [
        (op, times) for _, op, times, is_open in teacher.runs() if is_open and "matmul" in op.rest
    ]
    rows = grouped.block_size(pairs, here)
    assert [op.arrays[0].dims for op, _ in products] == [(rows, WIDTH)] * 3  # gate, up and down
    least = pairs / MESH["model"] / rows  # blocks on a chip; half of each expert's last is wasted
    assert all(least <= times / LAYERS / PIECES <= 1.25 * least for _, times in products)


def test_no_dense_logits_lie_in_memory_or_travel(planned):
    logits = LOCAL * VOCAB // MESH["model"]
    for name in ("teacher", "train"):
        part = planned["programs"][name]
        assert part["memory"]["temporaries"] < 4 * logits, name  # float32, of one model
        assert all(c["bytes"] < logits for c in part["collectives"]), name


def test_the_student_is_as_the_mesh_says(planned):
    kinds = {(c["kind"], c["axes"]) for c in planned["programs"]["train"]["collectives"]}
    assert any(kind == "all-gather" and axes == "fsdp" for kind, axes in kinds)
    assert not any(kind == "all-gather" and "model" in axes for kind, axes in kinds)
