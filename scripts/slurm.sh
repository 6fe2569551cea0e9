#!/usr/bin/env bash
#SBATCH --job-name=opd-jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#
# Train on the nodes of a Slurm job, one process a task. From the repository, or where .venv is:
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh --config=FILE[:args] --workdir=DIR [--config.KEY=VALUE]
#
# Arguments are those of opd-jax train; DIR and FILE have to be seen by all nodes. A process uses all
# devices of its task: one task a node (the default) all of the node's, --ntasks-per-node=8
# --gpus-per-task=1 one each, --ntasks-per-node=8 alone the one of its number, as jax does under Slurm.
#
# Two minutes before its time is up (another --signal=B:TERM@SECONDS to sbatch changes that; a step and a
# save must fit in) the run saves and ends, the job queues again, and goes on where it was. The same holds
# of a preemption whose grace time is enough; scontrol requeue does it by hand, sbatch with the same
# arguments later. What failed for another reason ends and is not queued again.
#
# Environment: OPD_JAX, the command (default .venv/bin/opd-jax, else opd-jax); OPD_JAX_PORT, a free port of
# the first node (default: by the number of the job).
set -euo pipefail

usage() { sed -n '/^# Train/,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

fail() {
  echo "slurm.sh: $1" >&2
  exit "${2:-1}"
}

has_config="" has_workdir=""
for argument in "$@"; do
  case "$argument" in
    -h | --help)
      usage
      exit 0
      ;;
    --config | --config=*) has_config=1 ;;
    --workdir | --workdir=*) has_workdir=1 ;;
    --coordinator* | --num-processes* | --process-index*)
      fail "found $argument: expected none of it, as Slurm says where the processes are; leave it out" 2
      ;;
  esac
done
[[ -n "$has_config" && -n "$has_workdir" ]] ||
  fail "found the arguments '$*': expected --config=FILE and --workdir=DIR; see scripts/slurm.sh --help" 2
[[ -n "${SLURM_JOB_ID:-}" ]] ||
  fail "SLURM_JOB_ID is not set: expected to run as a Slurm job; start it by sbatch scripts/slurm.sh ..."

cd "${SLURM_SUBMIT_DIR:-.}" # Slurm runs a copy of this file, from a folder of its own
program="${OPD_JAX:-.venv/bin/opd-jax}"
[[ -n "${OPD_JAX:-}" || -x "$program" ]] || program=opd-jax
command -v "$program" >/dev/null ||
  fail "found no $program in $PWD or on PATH: expected the command opd-jax; submit from the repository, or set OPD_JAX"

hosts="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}")" ||
  fail "scontrol show hostnames did not name the nodes of the job (SLURM_JOB_NODELIST '${SLURM_JOB_NODELIST:-}')"
tasks="${SLURM_NTASKS:-1}"
nodes="${SLURM_JOB_NUM_NODES:-$(wc -l <<<"$hosts")}"
coordinator="$(head -n 1 <<<"$hosts"):${OPD_JAX_PORT:-$((61440 + SLURM_JOB_ID % 4096))}"
export OPD_JAX_OWN_DEVICE=""
if ((tasks > nodes)) && [[ -z "${SLURM_GPUS_PER_TASK:-}" ]]; then
  OPD_JAX_OWN_DEVICE=1
fi
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over by itself
fi
echo "slurm.sh: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $tasks processes on $nodes nodes, coordinator $coordinator"

step=""
is_told=""
# Told once: to a process a second signal means to end without saving.
# shellcheck disable=SC2329 # called by the trap
pass_on() {
  if [[ -n "$step" && -z "$is_told" ]]; then
    is_told=1
    echo "slurm.sh: told to stop; the run saves"
    kill -TERM "$step" # srun passes it on to every task
  fi
}
trap pass_on TERM INT

# A task that ended must not end those that still write what is saved: a lost process is noticed by the
# others within a minute.
# shellcheck disable=SC2016 # the variables are those of a task
srun --kill-on-bad-exit=0 --wait=300 bash -c '
  if [[ -n "$OPD_JAX_OWN_DEVICE" ]]; then
    export JAX_LOCAL_DEVICE_IDS="$SLURM_LOCALID"
  fi
  exec "$@" --process-index="$SLURM_PROCID"' task \
  "$program" train "$@" --coordinator="$coordinator" --num-processes="$tasks" &
step=$!

status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
  status=0
  wait "$step" || status=$?
done

case "$status" in
  0) echo "slurm.sh: finished" ;;
  130 | 143)
    if scontrol requeue "$SLURM_JOB_ID"; then
      echo "slurm.sh: stopped by a signal and saved; the job is queued again and resumes"
    else
      echo "slurm.sh: stopped by a signal and saved; sbatch with the same arguments resumes" >&2
    fi
    ;;
  *) echo "slurm.sh: the run ended with status $status and is not queued again; its message is above" >&2 ;;
esac
exit "$status"
