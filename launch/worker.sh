#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on each worker of a TPU slice. All is kept below
# ~/frugax: code, venv, buckets and, of the run, log, pid, arguments and status.
#
#   worker.sh install EXTRA[,EXTRA]  a Python and the package with its extras
#   worker.sh start HOSTS --workdir=DIR --config=...   detached from the shell
#   worker.sh follow LINES           shows the log until the run ends: the last
#                                    ones, or with +1 all since the latest start
#   worker.sh last LINES             shows the last ones, each with the host
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

# own_disk DIR: whether it would be on a disk that goes with the machine.
own_disk() {
  local folder=$1 source root
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  source=$(findmnt -n -o SOURCE,FSTYPE -T "$folder") || return 1
  root=$(findmnt -n -o SOURCE,FSTYPE -T /) || return 1
  # (Of a folder that is mounted elsewhere as well the source has a [/folder].)
  [ "${source%%[\[ ]*}" = "${root%%[\[ ]*}" ] || [[ $source == *' tmpfs' ]]
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
      --workdir=/*)
        ! own_disk "${argument#*=}" ||
          die "the workdir ${argument#*=} is on this host's own disk, which" \
            'is deleted with the TPU, all checkpoints too: give' \
            'gs://BUCKET/DIR, or a folder of a disk that all hosts have mounted'
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
  # What was before may tell why the run was lost, and stays.
  touch "$HERE/log"
  echo "$(($(wc -l <"$HERE/log") + 1))" >"$HERE/first"
  setsid bash "$ROOT/launch/worker.sh" train "${arguments[@]}" \
    </dev/null >>"$HERE/log" 2>&1 &
  echo $! >"$HERE/pid"
}

train() {
  local status=0
  export PYTHON=$HERE/venv/bin/python
  trap forward TERM
  tend bash "$ROOT/launch/local.sh" "$@" || status=$?
  echo "$status" >"$HERE/status"
}

follow() {
  local lines=$1
  [ "$lines" != +1 ] || lines=+$(cat "$HERE/first")
  tail -n "$lines" -F --pid="$(cat "$HERE/pid")" "$HERE/log" 2>/dev/null
}

last() {
  tail -n "$1" "$HERE/log" | sed "s/^/[$(uname -n)] /"
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
  install | start | follow | last | report | stop | train) "$@" ;;
  *) usage && exit 2 ;;
esac
