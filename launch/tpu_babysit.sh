#!/usr/bin/env bash
# Keeps a run on a TPU going until it ends by itself: creates the TPU and starts
# the run. When the TPU is preempted, or does not answer five times in a row, it
# is deleted and created anew; when processes or hosts are lost, the run is
# started again on the TPU that is there. It goes on in the same workdir, and so
# with the same run.
#
#   launch/tpu_babysit.sh --topology=v5e:4x4 --zone=us-west4-a --spot \
#     --workdir=gs://BUCKET/runs/1b \
#     --config=configs/llama.py:size=1b,opt=stable_spam
#
# The options are those of launch/tpu_vm.sh; see its --help. And
#   --restarts=N  give up after N failures in a row (default 20). Between two
#                 the wait doubles, to 15 minutes; ten minutes of training make
#                 up for the failures before
#   --keep        do not delete the TPU in the end, nor when giving up; it costs
#                 until `launch/tpu_vm.sh down`
#   --dry-run     print the commands of a run without failures, and run none
#
# It may be stopped at any time, and started again with the same command: a run
# that is going on is left alone, one that failed or was stopped is started
# again. A TPU on which another run is going on is left to it (status 2). See
# the log with `launch/tpu_vm.sh logs` and the same options. The exit status is
# that of the run: 0 all steps are done, 1 failed, 2 a bad config, 143 stopped
# with `launch/tpu_vm.sh stop`; 3 after N failures. Before the TPU of a run that
# is not done is deleted the last lines of each host's log are shown.

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

: "${FRUGAX_POLL:=60}" # seconds between two questions
export FRUGAX_POLL
HEALTHY=600 # seconds of training after which earlier failures are forgotten
PATIENCE=5 # how often in a row a TPU that is there may not answer

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
  bash "$ROOT/launch/tpu_vm.sh" "$step" "$@" ${options[@]+"${options[@]}"}
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
silent=0 # how often in a row the TPU did not answer
pause=$FRUGAX_POLL
started=$SECONDS
mine='' # whether a run was seen to go on: before, what ended is of an earlier

say() { note "$(date '+%F %T') $*"; }

costs() {
  say "$1, and costs until you delete it:" \
    "$(show "$ROOT/launch/tpu_vm.sh" down ${options[@]+"${options[@]}"})"
}

# ended STATUS MESSAGE: deletes the TPU, or tells how to.
ended() {
  say "$2"
  # The reason, which the TPU takes with it.
  (($1 == 0)) || [ "$run" = - ] || tpu last >&2 || true
  if [ -n "$opt_keep" ]; then
    costs 'the TPU is still there'
  else
    tpu down || costs 'the TPU could not be deleted'
  fi
  exit "$1"
}

# The states of a TPU, or of a queued resource, that has no run any more, and of
# one that has, or is on its way. What Google has besides is left alone.
LOST='PREEMPTED TERMINATED STOPPED FAILED SUSPENDED'
COMING='CREATING STARTING RESTARTING REIMAGING REPAIRING ACCEPTED PROVISIONING
  WAITING_FOR_RESOURCES DELETING STOPPING SUSPENDING'
among() { case " ${2//$'\n'/ } " in *" $1 "*) ;; *) return 1 ;; esac; }
known() { among "${1:--}" "READY ACTIVE $LOST $COMING"; }

# Counts a failure, and waits.
failed() {
  if ((++failures >= opt_restarts)); then
    # What failed may have left a TPU.
    read -r state run <<<"$(tpu report)" || true
    set -- "giving up after $failures failures in a row: $*"
    case $state,$run in
      ABSENT,*) say "$1" && exit 3 ;;
      *,another) ;;
      *) ! known "$state" || ended 3 "$1" ;;
    esac
    say "$1"
    costs 'the TPU may still be there'
    exit 3
  fi
  say "$*; failure $failures of $opt_restarts, waiting $pause s"
  sleep "$pause"
  pause=$((pause * 2 > 900 ? 900 : pause * 2))
}

start() {
  started=$SECONDS
  if tpu run --detach; then mine=1; else failed 'the run did not start'; fi
}

tpu run --detach --dry-run >/dev/null # finds what is wrong with the options
while :; do
  read -r state run <<<"$(tpu report)" || true
  [ "$run" = unreachable ] || silent=0
  case $mine,$run in
    ,cancelled | ,lost | ,[1-9]*) run=none ;;
  esac
  case $state in
    READY | ACTIVE)
      case $run in
        running)
          mine=1
          if ((SECONDS - started > HEALTHY)); then
            failures=0 pause=$FRUGAX_POLL
          fi
          sleep "$FRUGAX_POLL"
          ;;
        none)
          say 'starting the run'
          start
          ;;
        another)
          die "a run with another workdir or config is going on on that TPU:" \
            'give this one another --name, or see launch/tpu_vm.sh stop'
          ;;
        0) ended 0 'all steps are done' ;;
        cancelled) ended "$STOPPED" 'the run was stopped, and has saved' ;;
        unreachable)
          failed 'the TPU is there but does not answer'
          if ((++silent == PATIENCE)); then
            say 'deleting it, to create another'
            tpu down || true
            silent=0
          fi
          ;;
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
    '' | UNKNOWN) failed 'Google Cloud does not answer' ;;
    *)
      if among "$state" "$COMING"; then
        say "the TPU is $state"
        sleep "$FRUGAX_POLL"
      elif among "$state" "$LOST"; then
        failed "the TPU is $state: deleting it, to create another"
        tpu down || true
      else
        failed "the TPU is $state, which says nothing to this script"
      fi
      ;;
  esac
done
