#!/usr/bin/env bash
# Trains on a Cloud TPU slice, controlled from your own machine with gcloud. Requests the slice, installs, starts training
# on all workers, and resumes training after every preemption.
#
#   bash launch/tpu_slice.sh COMMAND [--dry-run] [-- FLAGS OF train]
#
#   up        create, wait, install, train and watch; start with this one, and run it again after a reboot
#   create    request the slice (a queued resource)
#   wait      wait until the slice is active
#   install   install this folder's committed files and their requirements on all workers
#   train     start training on all workers, from the newest checkpoint in RUN
#   watch     check every minute; after a preemption: delete, create, wait, install, train
#   status    describe the queued resource
#   logs      show the last lines of every worker's log
#   stop      send SIGTERM to all workers: they save and end (end `watch` first, or it restarts them)
#   delete    release the slice
#
# --dry-run prints the commands instead of running them. Settings are environment variables:
#   ZONE          e.g. us-west4-a (must be set)
#   BUCKET        where data and the run are: gs://BUCKET or gs://BUCKET/FOLDER, read and written without a mount; the
#                 slice's service account needs the role "Storage Object User" (this or SHARED must be set)
#   SHARED        instead of BUCKET: what all workers mount at /mnt/shared, 10.0.0.2:/share (Filestore, NFS) or
#                 gs://BUCKET by gcsfuse, with a hierarchical namespace, which renames a folder atomically
#   DATA, CLIP    the data set and the CLIP folder, relative to BUCKET or SHARED (data, clip)
#   RUN           the run's folder, relative to BUCKET or SHARED (run)
#   CONFIG        the experiment (configs/aurora_64_v5e_256.py)
#   NAME          name of the slice (aurora)
#   ACCELERATOR   accelerator type (v5litepod-256)
#   RUNTIME       runtime version (v2-alpha-tpuv5-lite)
#   PROVISIONING  --spot, --reserved, or empty for on demand (--spot)
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "launch/tpu_slice.sh: $1" >&2; exit 2; }

command=${1:-}
[ $# -gt 0 ] && shift
dry=
train_flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=yes ;;
    --) shift; train_flags=("$@"); break ;;
    *) fail "unknown argument '$1' (flags of train come after --)" ;;
  esac
  shift
done

NAME=${NAME:-aurora}
ACCELERATOR=${ACCELERATOR:-v5litepod-256}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
PROVISIONING=${PROVISIONING---spot}
CONFIG=${CONFIG:-configs/aurora_64_v5e_256.py}
DATA=${DATA:-data}
CLIP=${CLIP:-clip}
RUN=${RUN:-run}
BUCKET=${BUCKET:-}
BUCKET=${BUCKET%/}
SHARED=${SHARED:-}
root=${BUCKET:-/mnt/shared}
archive=${TMPDIR:-/tmp}/aurora_jax-$NAME.tar.gz

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@" | sed 's/ $/\n/'
  else
    "$@"
  fi
}
say() { printf '== %s\n' "$1" >&2; }
queued() { run gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
everywhere() { run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# The queued resource's state: MISSING if there is none, UNKNOWN if gcloud fails. In a dry run, $1.
state() {
  local answer
  if [ -n "$dry" ]; then
    queued describe '--format=value(state.state)' >&2
    echo "$1"
  elif answer=$(queued describe '--format=value(state.state)' 2>&1); then
    echo "$answer"
  else
    case $answer in
      *NOT_FOUND* | *"not found"*) echo MISSING ;;
      *) echo UNKNOWN ;;
    esac
  fi
}

create() {
  say "requesting $ACCELERATOR as $NAME in $ZONE"
  # shellcheck disable=SC2086  # several words, or none
  queued create --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" $PROVISIONING
}

wait_until_active() {
  local now
  while now=$(state ACTIVE); [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDING | SUSPENDED | MISSING) say "the queued resource is $now"; return 1 ;;
    esac
    say "$(date +%H:%M:%S) $now"
    sleep 30
  done
}

install() {
  say "installing the committed files of this folder on all workers"
  run git archive --format=tar.gz --output="$archive" HEAD || return
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:aurora_jax.tar.gz" --zone="$ZONE" --worker=all || return
  local mount
  case $SHARED in
    "") mount= ;;
    gs://*) mount="sudo apt-get install -y -q gcsfuse && sudo gcsfuse -o allow_other --implicit-dirs --file-mode=666 --dir-mode=777 ${SHARED#gs://} /mnt/shared" ;;
    *) mount="sudo apt-get install -y -q nfs-common && sudo mount -t nfs $SHARED /mnt/shared" ;;
  esac
  [ -z "$mount" ] || mount="sudo mkdir -p /mnt/shared; mountpoint -q /mnt/shared || { $mount; }"
  # The runtime's Python is older than 3.11.
  everywhere "set -e; mkdir -p aurora_jax; tar xzf aurora_jax.tar.gz -C aurora_jax
$mount
python3 -m pip install --quiet --user uv; ~/.local/bin/uv python install --quiet 3.12
cd aurora_jax; PYTHON=\$(~/.local/bin/uv python find 3.12) bash launch/setup.sh --tpu"
}

train() {
  say "starting on all workers"
  local flags
  flags=$(printf '%q ' --config "$CONFIG" --workdir "$root/$RUN" --require tpu \
    --config.data.path="$root/$DATA" --config.text.clip="$root/$CLIP" --stopped-status 75 \
    ${train_flags[@]+"${train_flags[@]}"})
  everywhere "cd aurora_jax; rm -f train.status
nohup bash -c $(printf %q ".venv/bin/python -m aurora_jax train $flags; echo \$? > train.status") > train.log 2>&1 < /dev/null &"
}

# "running", the exit status of training, or "unreachable".
progress() {
  [ -n "$dry" ] && { echo running; return; }
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command='cat aurora_jax/train.status 2>/dev/null || echo running' 2>/dev/null || echo unreachable
}

resume_on_new_slice() {
  say "resuming from the newest checkpoint in $RUN"
  delete
  create && wait_until_active && install && train
}

watch() {
  local now
  while true; do
    now=$(state SUSPENDED)
    case $now in
      SUSPENDING | SUSPENDED | FAILED | MISSING)
        say "the slice was preempted ($now)"
        resume_on_new_slice || say "that failed; trying again in a minute" ;;
      ACTIVE)
        case $(progress) in
          0) say "all steps are done"; return ;;
          2 | 3) say "training ended with an error:"; logs; return 1 ;;
          running | unreachable) ;;
          *)
            say "training stopped early"
            # shellcheck disable=SC2016  # for the worker's shell
            everywhere 'pkill -KILL -u "$USER" -f "[a]urora_jax train" || true'
            train ;;
        esac ;;
    esac
    [ -n "$dry" ] && return
    sleep 60
  done
}

logs() { everywhere 'hostname; tail -n 5 aurora_jax/train.log'; }
delete() { queued delete --force --quiet || true; }

case $command in
  "" | -h | --help | help) usage; [ -n "$command" ]; exit ;;
  up | create | wait | install | train | watch | status | logs | stop | delete) ;;
  *) fail "unknown command '$command' (bash launch/tpu_slice.sh --help)" ;;
esac
[ -n "${ZONE:-}" ] || fail "ZONE is not set, e.g. ZONE=us-west4-a"
case $command in
  up | install | train | watch)
    [ -n "$BUCKET$SHARED" ] || fail "BUCKET is not set, e.g. BUCKET=gs://my-bucket (or SHARED=10.0.0.2:/share)"
    [ -z "$BUCKET" ] || [ -z "$SHARED" ] || fail "BUCKET and SHARED are both set: only one of them says where the data is"
    case $BUCKET in "" | gs://?*) ;; *) fail "BUCKET must begin with gs://, got '$BUCKET'" ;; esac ;;
esac
case $command in
  up | install | watch)
    [ -f "$CONFIG" ] || fail "config file not found: $CONFIG" ;;
esac
[ -n "$dry" ] || command -v gcloud > /dev/null || fail "gcloud is not installed (--dry-run works without)"

case $command in
  up)
    case $(state MISSING) in
      MISSING) create; wait_until_active; install; train ;;
      ACTIVE) say "$NAME exists already" ;;
      *) wait_until_active || resume_on_new_slice; install; train ;;
    esac
    watch ;;
  wait) wait_until_active ;;
  status) queued describe ;;
  stop)
    # shellcheck disable=SC2016  # for the worker's shell
    everywhere 'pkill -TERM -u "$USER" -f "[p]ython -m aurora_jax train" || true' ;;
  *) "$command" ;;
esac
