#!/usr/bin/env bash
# Train on every worker of a Cloud TPU slice, from a machine with gcloud and this repository.
#
#   scripts/tpu_pod.sh train NAME --zone=ZONE [options] -- --config=FILE[:args] --workdir=DIR [--config.KEY=VALUE]
#   scripts/tpu_pod.sh stop NAME --zone=ZONE [options]
#
#   --project=ID          default: gcloud's
#   --type=TYPE           such as v5litepod-16: create the slice where there is none, and again when it was
#   --runtime=VERSION     preempted; VERSION such as v2-alpha-tpuv5-lite
#   --spot                create it as a spot one, which may be preempted
#   --tries=N             starts of the run before giving up (default 10); a start that trained counts too
#
# train copies what git has of this repository to ~/opd_jax of every worker and installs it there, if that
# is not done; starts opd-jax train, or finds it running; follows it; and ends with its status. It goes on
# without this machine: the same command follows it again. DIR must be one folder that all workers see (a
# mounted bucket or Filestore); FILE and other paths are the workers', relative to ~/opd_jax.
#
# stop tells the run to save and to end; so does the shutdown of a worker that is preempted, whose notice
# of 30 seconds a step and a save must fit in, else the last checkpoint counts. train resumes it.
set -euo pipefail

usage() { sed -n '/^# Train/,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

fail() {
  echo "tpu_pod.sh: $1" >&2
  exit "${2:-1}"
}

say() { echo "tpu_pod.sh: $1"; }

command="${1:-}"
case "$command" in
  train | stop) ;;
  -h | --help)
    usage
    exit 0
    ;;
  *) fail "found '$command': expected train or stop; see scripts/tpu_pod.sh --help" 2 ;;
esac
name="${2:-}"
[[ -n "$name" && "$name" != -* ]] || fail "found no name of a TPU slice after $command: expected one" 2
shift 2
place=() zone="" type="" runtime="" spot=() tries=10
while (($#)); do
  case "$1" in
    --zone=?*) zone="${1#*=}" place+=("$1") ;;
    --project=?*) place+=("$1") ;;
    --type=?*) type="${1#*=}" ;;
    --runtime=?*) runtime="${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --tries=[1-9]*) tries="${1#*=}" ;;
    --)
      shift
      break
      ;;
    *) fail "found $1: expected --zone=, --project=, --type=, --runtime=, --spot, --tries=, or -- and the arguments of opd-jax train" 2 ;;
  esac
  shift
done
[[ -n "$zone" ]] || fail "found no --zone: expected --zone=ZONE, where the slice is" 2
[[ -n "$type" && -n "$runtime" || -z "$type$runtime$*" || -z "$type$runtime" ]] ||
  fail "found --type='$type' and --runtime='$runtime': expected both, to create a slice, or neither" 2
[[ "$tries" =~ ^[0-9]+$ ]] || fail "found --tries=$tries: expected a whole number" 2
command -v gcloud >/dev/null || fail "found no gcloud on PATH: expected the Google Cloud command line; install it"

# On all workers, as a script of bash; ends with the largest of their statuses, or gcloud's own.
on_workers() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

# READY, CREATING, PREEMPTED, ...; nothing where there is none.
state() {
  gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)' 2>/dev/null || true
}

# The worker's own run, if it is alive; in ~/opd_jax.
# shellcheck disable=SC2016 # the variables are the workers'
own_run='own_run() { pid="$(cat run.pid 2>/dev/null)" && grep -qsz opd-jax "/proc/$pid/cmdline"; }; '

if [[ "$command" == stop ]]; then
  # shellcheck disable=SC2016
  on_workers "$own_run"'cd ~/opd_jax 2>/dev/null && own_run || { echo "no run on $(hostname)"; exit 0; }
    kill -TERM "$pid"
    while own_run; do sleep 0.2; done
    echo "the run on $(hostname) has ended"'
  exit
fi

has_config="" has_workdir=""
for argument in "$@"; do
  case "$argument" in
    --config | --config=*) has_config=1 ;;
    --workdir | --workdir=*) has_workdir=1 ;;
  esac
done
[[ -n "$has_config" && -n "$has_workdir" ]] ||
  fail "found after -- the arguments '$*': expected --config=FILE and --workdir=DIR" 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
revision="$(git rev-parse HEAD)"

make_ready() {
  local found what="there is no slice $name"
  found="$(state)"
  [[ -z "$found" ]] || what="$name is $found"
  case "$found" in
    READY) return ;;
    "" | PREEMPTED | TERMINATED) ;;
    *) fail "$name is $found: expected READY; wait, or look at it with gcloud compute tpus tpu-vm describe" ;;
  esac
  [[ -n "$type" ]] ||
    fail "$what: expected a ready one; create it, or give --type and --runtime"
  if [[ -n "$found" ]]; then
    say "$what: deleting it"
    gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
  say "creating $name, $type"
  gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" --version="$runtime" "${spot[@]}"
}

# Copy and install on the workers that do not have this revision.
install() {
  local archive
  if on_workers "[[ \"\$(cat ~/opd_jax/.revision 2>/dev/null)\" == $revision ]]" >/dev/null 2>&1; then
    return
  fi
  say "installing ${revision:0:12} on the workers of $name"
  archive="$(mktemp -d)/opd_jax.tar.gz"
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all
  rm -r "$(dirname "$archive")"
  # shellcheck disable=SC2016 # the variables are the workers'
  on_workers 'set -e; mkdir -p ~/opd_jax; cd ~/opd_jax; tar xzf ../opd_jax.tar.gz; source scripts/setup.sh
    find_python >/dev/null 2>&1 || { sudo apt-get update -qq; sudo apt-get install -y -qq python3.11 python3.11-venv; }
    setup_venv .venv scripts/requirements.lock
    .venv/bin/python -m pip install --quiet --constraint scripts/requirements.lock "jax[tpu]"
    echo '"$revision"' >.revision'
}

# The run, apart from the connection: it lives on when that ends. What is asked a second time only follows.
# On Compute Engine nothing in the environment tells of the other workers: jax is to look itself.
start() {
  # shellcheck disable=SC2016
  on_workers "$own_run"'cd ~/opd_jax || exit 1
    if ! own_run; then
      rm -f run.pid run.status
      nohup setsid bash -c '"'"'
        .venv/bin/opd-jax train --coordinator=auto "$@" & echo $! >run.pid
        status=0; wait $! || status=$?; echo $status >run.status
      '"'"' run '"$(printf '%q ' "$@")"' >run.log 2>&1 </dev/null &
      until [[ -s run.status ]] || own_run; do sleep 0.1; done
    fi
    tail --pid="$(cat run.pid)" -n +1 -f run.log
    until [[ -s run.status ]]; do sleep 0.1; done
    exit "$(cat run.status)"'
}

for ((try = 1; try <= tries; try++)); do
  make_ready
  install
  say "start $try: opd-jax train $*"
  status=0
  start "$@" || status=$?
  found="$(state)"
  if ((status == 0)); then
    say "finished"
    exit 0
  fi
  if [[ "$found" == READY ]]; then
    say "the run ended with status $status on a slice that is ready: its message is above; the same command resumes"
    exit "$status"
  fi
  say "the run ended with status $status and $name is ${found:-gone}"
done
fail "gave up after $tries starts; the same command resumes"
