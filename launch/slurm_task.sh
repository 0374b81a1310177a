#!/usr/bin/env bash
# What launch/slurm.sbatch has srun start: a trainer, which SIGUSR1 asks to save
# and to end. (srun takes a SIGTERM of its step for the step's end, and kills
# what has not ended when Slurm's KillWait is over, 30 s as a rule.)
#
#   launch/slurm_task.sh COMMAND...

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

# Slurm signals all processes of a task: the trainer is to ignore SIGUSR1, and
# this shell to outlive SIGTERM, which the trainer has as well.
trap '' USR1
trap ':' TERM
"$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' USR1
status=0
wait_for "$child" || status=$?
# A trainer that SIGTERM stops saves and ends with 0; one that it ends before
# that is no worse. srun gives the highest status of its tasks, which is to be
# that of the task that was lost or has failed, not of those it then ended.
((status != STOPPED)) || status=0
# The first that was killed or has failed by itself is the cause. It says so in
# the workdir, which all nodes see. (134: it has lost another.)
if [ -n "${FRUGAX_CAUSE:-}" ] && ((status != 0 && status != 134)); then
  mkdir -p "$(dirname "$FRUGAX_CAUSE")" || true
  (set -C && echo "$status" >"$FRUGAX_CAUSE") 2>/dev/null || true
fi
exit "$status"
