#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on each worker of a TPU slice. All is kept below
# ~/frugax: code, venv, buckets and, of the run, log, pid, arguments and status.
#
#   worker.sh install EXTRA[,EXTRA]  a Python and the package with its extras
#   worker.sh start HOSTS --workdir=DIR --config=...   detached from the shell
#   worker.sh follow LINES           shows the log until the run ends
#   worker.sh report --workdir=DIR --config=...   prints 'frugax: STATE' of the
#                                    run with these arguments; without a config,
#                                    of that in the workdir
#   worker.sh stop                   sends SIGTERM: the run saves and ends
#   worker.sh train --workdir=...    (what start leaves running)

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

HERE=$HOME/frugax
UV=0.13.8
PYTHON_VERSION=3.12 # of launch/constraints/py312.txt

# The images' own Python is older than 3.11.
install() {
  local uv=$HOME/.local/bin/uv
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet "uv==$UV"
  [ -x "$HERE/venv/bin/python" ] ||
    "$uv" venv --quiet --python "$PYTHON_VERSION" "$HERE/venv"
  "$uv" pip install --quiet --python "$HERE/venv/bin/python" \
    --editable "${ROOT}[$1]" --constraint "$ROOT/launch/constraints/py312.txt"
}

# Makes gs://BUCKET/DIR a folder, MOUNTED. Hosts read what others have just
# written, so nothing is remembered of what is, or is not, there; checkpoints
# are renamed. (It prints no folder: in $(...) bash goes on after a failure, and
# the run would be saved on a disk that goes with the machine.)
mount_bucket() {
  local rest=${1#gs://}
  local folder=$HERE/buckets/${rest%%/*}
  if ! mountpoint -q "$folder"; then
    # (An image may have none, or one that is too old.)
    [[ $(gcsfuse --help 2>&1) == *negative-ttl* ]] || install_gcsfuse
    mkdir -p "$folder"
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 \
      --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      "${rest%%/*}" "$folder" >&2 ||
      die "gs://${rest%%/*} cannot be mounted: may the TPU's service account" \
        'read and write it?'
    mountpoint -q "$folder" ||
      die "gs://${rest%%/*} is not mounted, though gcsfuse reports no error"
  fi
  MOUNTED=$HERE/buckets/$rest
}

install_gcsfuse() {
  local url=https://packages.cloud.google.com/apt
  local key=/usr/share/keyrings/cloud.google.asc
  {
    curl -sSf "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list
    # (A machine that has just started may be upgrading its packages.)
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install gcsfuse
  } >&2
}

# (After a restart of the machine the number may be that of another process.)
alive() {
  grep -qs worker.sh "/proc/$(cat "$HERE/pid" 2>/dev/null)/cmdline"
}

# mine ARGUMENT...: whether the latest run here was started with these, or with
# this workdir if they are no more.
mine() {
  local had
  (($#)) || return 0
  had=$(cat "$HERE/arguments" 2>/dev/null) || return
  [ "$had" = "$(quote "$@")" ] ||
    { (($# == 1)) && [[ $had == "$(quote "$1") "* ]]; }
}

start() {
  local hosts=$1 arguments=() argument given
  shift
  ! alive || die "a run is going on here; follow it with 'logs', or 'stop' it"
  rm -f "$HERE/arguments" "$HERE/status" "$HERE/cancelled"
  given=$(quote "$@")
  while (($#)); do
    argument=$1
    shift
    # In two words it is the same.
    case $argument,${1:-} in
      --config.data.*=*) ;;
      --config.data.*,gs://*)
        argument=$argument=$1
        shift
        ;;
    esac
    case $argument in
      --workdir=gs://* | --config.data.*=gs://*)
        mount_bucket "${argument#*=}"
        argument=${argument%%=*}=$MOUNTED
        ;;
    esac
    arguments+=("$argument")
  done
  # Several hosts: JAX finds the others by what Google Cloud tells it, once the
  # trainer knows that there are any.
  ((hosts == 1)) || export JAX_NUM_PROCESSES=$hosts
  if [ -e "$HOME/frugax-secrets" ]; then
    # shellcheck source=/dev/null
    . "$HOME/frugax-secrets"
  fi
  printf '%s\n' "$given" >"$HERE/arguments"
  cd "$ROOT"
  setsid bash "$ROOT/launch/worker.sh" train "${arguments[@]}" \
    </dev/null >"$HERE/log" 2>&1 &
  echo $! >"$HERE/pid"
}

train() {
  local trainer status=0
  PYTHON=$HERE/venv/bin/python bash "$ROOT/launch/local.sh" "$@" &
  trainer=$!
  trap 'kill -TERM "$trainer" 2>/dev/null || true' TERM
  wait_for "$trainer" || status=$?
  echo "$status" >"$HERE/status"
}

follow() {
  tail -n "$1" -F --pid="$(cat "$HERE/pid")" "$HERE/log" 2>/dev/null
}

report() {
  local status
  if alive; then
    if mine "$@"; then echo 'frugax: running'; else echo 'frugax: another'; fi
    return
  fi
  # (Written before the run ends, and so to be read after it has.)
  status=$(cat "$HERE/status" 2>/dev/null) || true
  if ! mine "$@"; then
    echo 'frugax: none'
  elif [ -e "$HERE/cancelled" ] && [ "$status" = "$STOPPED" ]; then
    echo 'frugax: cancelled'
  elif [ -n "$status" ]; then
    echo "frugax: ended $status"
  else
    echo 'frugax: lost' # the machine was restarted, or the run killed
  fi
}

stop() {
  alive || return 0
  touch "$HERE/cancelled"
  kill -TERM "$(cat "$HERE/pid")"
}

case ${1:-} in
  install | start | follow | report | stop | train) "$@" ;;
  *) usage && exit 2 ;;
esac
