#!/usr/bin/env bash
# Trains on a TPU VM or a slice of a TPU pod. One command creates the machines,
# sends the code, installs it, trains, shows the log, and tears down:
#
#   launch/tpu_vm.sh all --topology=v5e:4x4 --zone=us-west4-a \
#     --workdir=gs://BUCKET/runs/1b \
#     --config=configs/llama.py:size=1b,opt=stable_spam
#
# The steps can be taken one by one, with the same options:
#   up      create the TPU, or queue for it, and wait until it is ready
#   run     send the code, install it, start the run, show its log; an error
#           where a run with another workdir or config is going on
#   logs    show the log again; the run does not need you to stay connected
#   last    show the last 100 lines of the log of each host, each with its name
#   report  tell the state of the TPU and of the run on each host
#   stop    end the run after it has saved; `run` goes on from there
#   down    delete the TPU
#   all     up, run and, once the run has ended by itself, down; before that,
#           where it has failed, last
#
# Where and what
#   --topology=CHIP:SHAPE  as the planner names it: v5e:4x4, v6e:2x4, v5p:2x2x2
#   --zone=ZONE            one in which you have quota for it
#   --project=ID           default: gcloud's
#   --name=NAME            of the TPU; default: frugax-, the end of the workdir
#                          and a sum of all of it
#   --workdir=DIR          gs://BUCKET/DIR, or a folder that all hosts see, of
#                          no disk of theirs, which `down` deletes
#   --config=...           and --config.FIELD=VALUE: the trainer's; a bucket of
#                          --config.data.data_dir=gs://... is mounted as well
# How it is created
#   --spot                 cheaper, and may be taken away: see tpu_babysit.sh
#   --queue                by a queued resource, which waits for capacity
#   --labels=KEY=VALUE,... on the TPU
#   --runtime=VERSION      another image than the usual one of the chip
#   --create-flag=FLAG     one more flag for gcloud, e.g.
#                          --create-flag=--network=NAME; may be repeated
# The code
#   --commit=REV           clone this commit; default: send the working tree
#   --repo=URL             what to clone it from; default: that of origin
#   --extras=tpu,wandb     extras to install; default: tpu
#   --secret=NAME          hand an environment variable on, as WANDB_API_KEY and
#                          HF_TOKEN are if they are set; may be repeated
# And
#   --detach               do not follow the log of `run`
#   --dry-run              print the commands, one a line, and run none
#
# The exit status is that of the run: 0 all steps are done, 143 stopped, 1
# failed, 2 a bad config or option; 3 when the TPU cannot be had or reached.

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

STEPS='up run logs last report stop down all'
UNREACHABLE=3
: "${FRUGAX_POLL:=20}" # seconds between two questions
step=${1:-}
case " $STEPS " in
  *" ${step:-none} "*) shift ;;
  *)
    case $step in '' | -h | --help) usage && exit 0 ;; esac
    # shellcheck disable=SC2086
    unknown step "$step" $STEPS
    ;;
esac

parse "$TPU_OPTIONS" "$@"

need topology 'which TPU, e.g. --topology=v5e:4x4'
topology "$opt_topology"
need zone 'a zone in which you have TPUs, e.g. --zone=us-west4-a'
valid zone "$opt_zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'one is us-west4-a'
need workdir 'the folder of the run, e.g. --workdir=gs://BUCKET/runs/1b'
valid workdir "$opt_workdir" \
  'gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]/[^ ].*|/.*' \
  'give gs://BUCKET/DIR, or an absolute path that all hosts see'
check_workdir
: "${opt_name:=$(default_name "$opt_workdir")}"
valid name "$opt_name" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' \
  'lower-case letters, digits and -, a letter first, 63 at most'
if [ -n "$opt_project" ]; then
  valid project "$opt_project" '([-a-z0-9.]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]' \
    "give the project's ID, as in my-project-1"
fi
check_labels "$opt_labels"
: "${opt_runtime:=$RUNTIME}"
[ -n "$opt_runtime" ] ||
  die "there are no TPU VMs of $opt_topology: use launch/gke_xpk.sh"
: "${opt_extras:=tpu}"
valid extras "$opt_extras" '[a-z]+(,[a-z]+)*' 'names with commas: tpu,wandb'
case $step in run | all) check_train ;; esac
if [ -n "$opt_commit" ]; then
  opt_commit=$(git -C "$ROOT" rev-parse --verify --quiet \
    "$opt_commit^{commit}") || die '--commit: git knows no such commit'
  : "${opt_repo:=$(git -C "$ROOT" remote get-url origin 2>/dev/null || true)}"
  need repo 'the repository has no origin to clone the commit from'
  host=${opt_repo#*://}
  case ${opt_repo%%://*},${host%%/*} in
    *,*:*@* | [Hh][Tt][Tt][Pp]*,*@*)
      die 'the URL to clone from has a password or a token in it, which' \
        'others would see: give a --repo=URL without, or leave --commit out:' \
        'then the working tree is sent'
      ;;
  esac
elif [ -n "$opt_repo" ]; then
  die '--repo without --commit: the working tree is sent, nothing is cloned'
fi
# Fails early; the subshell of a later command could not end the script.
secret_names >/dev/null

where=("--zone=$opt_zone")
[ -z "$opt_project" ] || where+=("--project=$opt_project")

tpu() { run gcloud compute tpus tpu-vm "$@"; }
queued() { run gcloud compute tpus queued-resources "$@"; }

# remote WORKER COMMAND: on one worker, by number, or on all.
remote() {
  tpu ssh "$opt_name" "${where[@]}" "--worker=$1" "--command=$2" \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=30 --quiet
}

# The command that a worker's shell reads back word for word.
worker() { quote bash frugax/code/launch/worker.sh "$@"; }

describe() {
  if [ -n "$opt_queue" ]; then
    queued describe "$opt_name" "${where[@]}" '--format=value(state.state)'
  else
    tpu describe "$opt_name" "${where[@]}" '--format=value(state)'
  fi
}

# What the hosts know of this run, rather than of an earlier one.
ask() {
  local told
  told=$(worker report "--workdir=$opt_workdir" ${TRAIN[@]+"${TRAIN[@]}"})
  remote all "if [ -e frugax/pid ] && [ -e frugax/code/launch/worker.sh ];\
 then $told; else echo 'frugax: none'; fi"
}

# The state of the TPU in Google's word; nothing if there is no such TPU.
state() {
  local answer file errors failed=''
  file=$(mktemp)
  answer=$(describe 2>"$file") || failed=1
  errors=$(cat "$file")
  rm -f "$file"
  case $failed,$errors in
    ,*) printf '%s\n' "$answer" | tail -n 1 ;;
    *NOT_FOUND* | *'not found'*) ;;
    *) note "$errors" && echo UNKNOWN ;;
  esac
}

create() {
  local flags=()
  [ -z "$opt_spot" ] || flags+=(--spot)
  [ -z "$opt_labels" ] || flags+=("--labels=$opt_labels")
  flags+=(${opt_create_flag[@]+"${opt_create_flag[@]}"} --quiet)
  if [ -n "$opt_queue" ]; then
    queued create "$opt_name" "${where[@]}" "--node-id=$opt_name" \
      "--accelerator-type=$ACCELERATOR" "--runtime-version=$opt_runtime" \
      "${flags[@]}"
  else
    tpu create "$opt_name" "${where[@]}" "--accelerator-type=$ACCELERATOR" \
      "--version=$opt_runtime" "${flags[@]}"
  fi
}

# (Where the caller asks whether a function failed, bash ignores `set -e` in all
# of it. Hence each `|| return`.)
up() {
  local now created='' unknown=0
  if [ -n "$opt_dry_run" ]; then
    create
    [ -z "$opt_queue" ] || describe
    return
  fi
  while :; do
    now=$(state)
    if [ -z "$now" ] && [ -z "$created" ]; then
      create || return "$UNREACHABLE"
      created=1
      continue
    fi
    # In hours of waiting a connection may fail, and work again.
    if [ "$now" != UNKNOWN ]; then
      unknown=0
    elif ((++unknown < 5)); then
      sleep "$FRUGAX_POLL"
      continue
    fi
    case $now in
      READY | ACTIVE) return ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | ACCEPTED | \
        PROVISIONING | WAITING_FOR_RESOURCES)
        note "$(date +%H:%M:%S) the TPU $opt_name is $now"
        sleep "$FRUGAX_POLL"
        ;;
      *)
        note "error: the TPU $opt_name is ${now:-not there}: delete what is" \
          "left of it with '$0 down' and the same options, and try again"
        return "$UNREACHABLE"
        ;;
    esac
  done
}

install_code() {
  # The code that is there stays until the other is complete: it answers.
  local files=() unpack='rm -rf frugax/new && mkdir -p frugax/new && '
  stage
  if [ -n "$(secret_names)" ]; then
    [ -n "$opt_dry_run" ] || write_secrets "$STAGE/frugax-secrets"
    files+=("$STAGE/frugax-secrets")
  else
    unpack="rm -f frugax-secrets && $unpack" # of an earlier run
  fi
  if [ -n "$opt_commit" ]; then
    unpack+="git clone --quiet $(quote "$opt_repo") frugax/new && "
    unpack+="git -C frugax/new checkout --quiet $opt_commit"
  else
    run bash "$ROOT/launch/pack.sh" "$STAGE/frugax-code.tgz" || return
    files+=("$STAGE/frugax-code.tgz")
    unpack+='tar -xzf frugax-code.tgz -C frugax/new'
  fi
  unpack+=' && rm -rf frugax/code && mv frugax/new frugax/code'
  if ((${#files[@]})); then
    # gcloud copies to several hosts at once only with its key in the agent, if
    # there is an agent.
    if ((HOSTS > 1)) && [ -n "${SSH_AUTH_SOCK:-}" ]; then
      run ssh-add -q "$HOME/.ssh/google_compute_engine" || return
    fi
    tpu scp ${files[@]+"${files[@]}"} "$opt_name:" "${where[@]}" \
      --worker=all --quiet || return
  fi
  unstage
  remote all "$unpack && $(worker install "$opt_extras")"
}

another() {
  die "a run with another workdir or config is going on on the TPU $opt_name:" \
    "give this one another --name, or end that with '$0 stop'"
}

run_step() {
  # The first connection, which makes the key, and is made again while the TPU
  # starts. The code of a run that goes on stays as it is.
  if [ -n "$opt_dry_run" ]; then
    ask
  else
    case $(verdict) in
      unreachable) return "$UNREACHABLE" ;;
      running)
        note "a run is going on there, and is left alone; '$0 stop' ends it"
        [ -n "$opt_detach" ] || logs
        return
        ;;
      another) another ;;
    esac
  fi
  install_code || return "$UNREACHABLE"
  remote all \
    "$(worker start "$HOSTS" "--workdir=$opt_workdir" "${TRAIN[@]}")" ||
    return "$UNREACHABLE"
  [ -n "$opt_detach" ] || logs
}

# What the hosts say, in one word: running, another (run is), none, cancelled,
# lost, unreachable or the exit status. Only the first host needs to see that
# all steps are done.
verdict() {
  local lines
  lines=$(ask | sed -n 's/^.*frugax: //p' || true)
  case $lines in
    '') echo unreachable ;;
    *another*) echo another ;;
    *running*) echo running ;;
    *none*) echo none ;;
    *lost*) echo lost ;;
    *)
      # The cause: a host that was killed; or else the trainer's own failure,
      # below 126; or that others were lost (134), of which one has ended by
      # itself. Nor has a run that failed while it was to stop saved.
      printf '%s\n' "$lines" | sort | awk -v stopped="$STOPPED" -v alone=134 '
        $1 == "cancelled" { cancelled = 1; next }
        $2 == 0 { done = 1; next }
        $2 == stopped { next }
        $2 == alone { left = alone; next }
        $2 < 126 { own = $2; next }
        { killed = $2 }
        END {
          if (killed) print killed
          else if (own) print own
          else if (left) print left
          else if (done) print 0
          else print cancelled ? "cancelled" : stopped
        }'
      ;;
  esac
}

logs() {
  local lines=+1 now tries=0 following=1
  if [ -n "$opt_dry_run" ]; then
    remote 0 "$(worker follow "$lines")"
    ask
    return
  fi
  trap 'note "The run goes on, and the TPU costs, until the steps stop and" \
    "down; logs shows the log again."; exit 130' INT
  while :; do
    # Where the run on the first host has ended, others may take longer.
    if [ -n "$following" ] && remote 0 "$(worker follow "$lines")"; then
      following=''
    fi
    now=$(verdict 2>/dev/null)
    case $now in
      running)
        [ -z "$following" ] ||
          note 'the connection was lost, the run goes on: connecting again'
        tries=0
        ;;
      none)
        die 'no run with these options was started on this TPU: see the' \
          'step run'
        ;;
      another) another ;;
      unreachable)
        if ((++tries == 5)); then
          note "error: the TPU $opt_name cannot be reached; it is $(state)"
          return "$UNREACHABLE"
        fi
        ;;
      cancelled) return "$STOPPED" ;;
      lost) return 1 ;;
      *) return "$now" ;;
    esac
    lines=10
    sleep "$FRUGAX_POLL"
  done
}

# One line: the state of the TPU, and what its hosts say of the run.
report() {
  local now
  if [ -n "$opt_dry_run" ]; then
    describe
    ask
    return
  fi
  now=$(state)
  case $now in
    READY | ACTIVE) printf '%s %s\n' "$now" "$(verdict 2>/dev/null)" ;;
    *) printf '%s -\n' "${now:-ABSENT}" ;;
  esac
}

last() { remote all "$(worker last 100)"; }

down() {
  if [ -n "$opt_queue" ]; then
    queued delete "$opt_name" "${where[@]}" --force --quiet
  else
    tpu delete "$opt_name" "${where[@]}" --quiet
  fi
}

all() {
  local status=0
  up || return
  run_step || status=$?
  if [ -n "$opt_detach" ] || ((status == UNREACHABLE)); then
    note "The TPU $opt_name is still there, and costs until the step down."
  else
    # What the machines know of the reason goes with them.
    ((status == 0)) || last || true
    down
  fi
  return "$status"
}

case $step in
  run) run_step ;;
  stop) remote all "$(worker stop)" ;;
  *) "$step" ;;
esac
