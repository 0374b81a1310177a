#!/usr/bin/env bash
# Keeps a run on a TPU going until it ends by itself: creates the TPU, starts
# the run and, whenever the TPU is preempted or a host is lost, creates it anew
# and goes on in the same workdir, and so with the same run.
#
#   launch/tpu_babysit.sh --topology=v5e:4x4 --zone=us-west4-a --spot \
#     --workdir=gs://BUCKET/runs/1b \
#     --config=configs/llama.py:size=1b,opt=stable_spam
#
# The options are those of launch/tpu_vm.sh; see its --help. And
#   --restarts=N  give up after N failures in a row (default 20). Between two
#                 the wait doubles, to 15 minutes; ten minutes of training make
#                 up for the failures before
#   --keep        do not delete the TPU in the end
#   --dry-run     print the commands of a run without failures, and run none
#
# It may be stopped at any time, and started again with the same command. See
# the log with `launch/tpu_vm.sh logs` and the same options. The exit status is
# that of the run: 0 all steps are done, 1 failed, 2 a bad config, 143 stopped
# with `launch/tpu_vm.sh stop`; 3 after N failures.

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

: "${FRUGAX_POLL:=60}" # seconds between two questions
export FRUGAX_POLL
HEALTHY=600 # seconds of training after which earlier failures are forgotten

parse "$TPU_OPTIONS restarts= keep" "$@"
: "${opt_restarts:=20}"
valid restarts "$opt_restarts" '[1-9][0-9]*' 'a number, 1 or more'
[ -z "$opt_detach" ] || die '--detach: leave it out, nothing follows the log'
options=()
for argument in "$@"; do
  case $argument in
    --restarts=* | --keep | --dry-run) ;;
    --restarts) die 'write --restarts=N' ;;
    *) options+=("$argument") ;;
  esac
done

# tpu STEP OPTION...: more options come first, what follows -- is the trainer's.
tpu() {
  local step=$1
  shift
  bash "$ROOT/launch/tpu_vm.sh" "$step" "$@" "${options[@]}"
}

if [ -n "$opt_dry_run" ]; then
  tpu report --dry-run
  tpu up --dry-run
  tpu run --detach --dry-run
  tpu report --dry-run
  [ -n "$opt_keep" ] || tpu down --dry-run
  exit
fi

failures=0
pause=$FRUGAX_POLL
started=$SECONDS

say() { note "$(date '+%F %T') $*"; }

# Counts a failure, and waits.
failed() {
  if ((++failures >= opt_restarts)); then
    say "giving up after $failures failures in a row: $*"
    exit 3
  fi
  say "$*; failure $failures of $opt_restarts, waiting $pause s"
  sleep "$pause"
  pause=$((pause * 2 > 900 ? 900 : pause * 2))
}

start() {
  started=$SECONDS
  tpu run --detach || failed 'the run did not start'
}

ended() {
  say "$2"
  if [ -z "$opt_keep" ]; then
    tpu down || say 'the TPU could not be deleted: see launch/tpu_vm.sh down'
  fi
  exit "$1"
}

tpu up --dry-run >/dev/null # finds what is wrong with the options
while :; do
  read -r state run <<<"$(tpu report)" || true
  case $state in
    READY | ACTIVE)
      case $run in
        running)
          if ((SECONDS - started > HEALTHY)); then
            failures=0 pause=$FRUGAX_POLL
          fi
          sleep "$FRUGAX_POLL"
          ;;
        none)
          say 'starting the run'
          start
          ;;
        0) ended 0 'all steps are done' ;;
        cancelled) ended "$STOPPED" 'the run was stopped, and has saved' ;;
        unreachable) failed 'the TPU is there but does not answer' ;;
        *)
          # 126 and above: a signal or a lost host ended it, not the trainer.
          if [ "$run" != lost ] && ((run < 126)); then
            ended "$run" "the run failed with status $run"
          fi
          failed "the run was interrupted ($run)"
          start
          ;;
      esac
      ;;
    ABSENT)
      say 'creating the TPU'
      tpu up || failed 'there is no TPU to be had'
      ;;
    CREATING | STARTING | RESTARTING | REPAIRING | ACCEPTED | PROVISIONING | \
      WAITING_FOR_RESOURCES | DELETING | STOPPING | SUSPENDING)
      say "the TPU is $state"
      sleep "$FRUGAX_POLL"
      ;;
    '' | UNKNOWN) failed 'Google Cloud does not answer' ;;
    *)
      failed "the TPU is $state: deleting it, to create another"
      tpu down || true
      ;;
  esac
done
