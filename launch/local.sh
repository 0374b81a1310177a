#!/usr/bin/env bash
# Trains on this machine: on all of its accelerators, or else on its CPU.
#
#   launch/local.sh --workdir=runs/tiny \
#     --config=configs/llama.py:size=tiny,opt=galore --config.steps=300
#
# Give the same command again to go on from the latest checkpoint. The default
# data set, Python's standard library, is written to ./data first.
#
#   --workdir=DIR  the run's folder
#   --config=...   and --config.FIELD=VALUE: the trainer's, as they are
#   --dry-run      print the commands, one a line, and run none
#
# PYTHON says which interpreter; by default the repository's .venv/bin/python,
# where there is one, or python3. The exit status is 0 when all steps are done,
# 143 when SIGTERM or Ctrl-C ended the run, which has saved and will go on, or
# had not begun, 1 when the run failed and 2 when the config is wrong.

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

parse 'workdir=' "$@"
need workdir 'the folder of the run'
check_train

python=$(interpreter)
trainer=("$python" -m frugax.train "--workdir=$opt_workdir" "${TRAIN[@]}")

corpus=("$python" -m frugax.train.corpus --data_dir=data)
if [ -n "$opt_dry_run" ]; then
  ! reads_stdlib || show "${corpus[@]}"
  show "${trainer[@]}"
  exit
fi

trap forward TERM INT
if reads_stdlib; then
  tend "${corpus[@]}"
fi
before=$(summary_time "$python" "$opt_workdir")
# A mounted bucket gets a file when it is closed, or synchronised: the metrics,
# which stay open, would be lost with the machine. (The first are written when
# the first steps are done.)
: "${FRUGAX_SYNC:=60}" # seconds between two
while sleep "$FRUGAX_SYNC" && kill -0 "$$"; do
  sync "$opt_workdir/metrics.jsonl" || true
done >/dev/null 2>&1 </dev/null &
syncing=$!
status=0
tend "${trainer[@]}" || status=$?
kill "$syncing" 2>/dev/null || true
if ((status == 0)) &&
  [ "$(summary_time "$python" "$opt_workdir")" = "$before" ]; then
  status=$STOPPED
fi
exit "$status"
