#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: by xpk, or by a plain JobSet manifest
# (launch/jobset.yaml) and kubectl. The code comes in an image: build and push
# that of launch/Dockerfile.
#
#   launch/gke_xpk.sh run --cluster=CLUSTER --zone=us-west4-a \
#     --topology=v5e:4x4 --image=IMAGE --workdir=/bucket/runs/1b \
#     --config=configs/llama.py:size=1b,opt=stable_spam
#   launch/gke_xpk.sh run --via=jobset --topology=v5e:4x4 --image=IMAGE \
#     --workdir=gs://BUCKET/runs/1b --config=configs/llama.py:size=1b
#
#   run     start the run, or go on with it after `down`, or when it has ended:
#           then its job is deleted first
#   logs    follow the log of the first host
#   report  tell how it stands
#   down    end the run, which saves, delete its job, and wait until it is gone
#   render  print the manifest of --via=jobset
#
#   --via=xpk|jobset       default: xpk
#   --topology=CHIP:SHAPE  as the planner names it: v5e:4x4, v6e:2x4, v5p:2x2x2
#   --image=IMAGE          with the code; a tag of each commit, rather than one
#                          that moves, goes on with the code that it began with
#   --workdir=DIR          with jobset gs://BUCKET/DIR, which is mounted; with
#                          xpk a path in storage that `xpk storage attach` has
#                          given to the cluster
#   --config=...           and --config.FIELD=VALUE: the trainer's
#   --name=NAME            default: frugax-, the end of the workdir and a sum of
#                          all of it
#   --restarts=N           how often to go on after a preemption; default 100
#   --spot                 on nodes that may be taken away
#   --secret=NAME          hand an environment variable on, as WANDB_API_KEY and
#                          HF_TOKEN are if they are set; may be repeated. With
#                          jobset they are a Kubernetes secret; xpk writes them
#                          into the job, which users of the cluster can read
#   --cluster, --zone, --project          for xpk
#   --namespace, --service-account, --labels=KEY=VALUE,...   for jobset
#   --dry-run              print the commands, one a line, and run none

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

STEPS='run logs report down render'
JOBSET=jobset.sigs.k8s.io/jobset-name # the label of a job's pods
step=${1:-}
case " $STEPS " in
  *" ${step:-none} "*) shift ;;
  *)
    case $step in '' | -h | --help) usage && exit 0 ;; esac
    # shellcheck disable=SC2086
    unknown step "$step" $STEPS
    ;;
esac
parse 'via= topology= image= workdir= name= restarts= spot secret+ cluster=
  zone= project= namespace= service-account= labels=' "$@"

: "${opt_via:=xpk}"
case $opt_via in xpk | jobset) ;; *) unknown via "$opt_via" xpk jobset ;; esac
[ "$step" != render ] || opt_via=jobset
need workdir 'the folder of the run'
check_workdir
: "${opt_name:=$(default_name "$opt_workdir")}"
valid name "$opt_name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
  'lower-case letters, digits and -, a letter first, 40 at most'
if [ "$opt_via" = xpk ]; then
  need cluster "the GKE cluster's name"
  valid cluster "$opt_cluster" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
    'lower-case letters, digits and -'
  need zone 'that of the cluster, e.g. --zone=us-west4-a'
  valid zone "$opt_zone" '[a-z]+-[a-z]+[0-9]+(-[a-z])?' 'one is us-west4-a'
  valid workdir "$opt_workdir" '/.*' 'xpk mounts no bucket for a run:
attach it to the cluster (xpk storage attach), and give its path there'
  workdir=$opt_workdir
else
  valid workdir "$opt_workdir" \
    'gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]/[^ ].*' 'give gs://BUCKET/DIR'
  workdir=${opt_workdir#gs://}
  bucket=${workdir%%/*}
  workdir=/bucket/${workdir#*/}
fi
for option in namespace service_account; do
  value=opt_$option
  [ -z "${!value}" ] || valid "${option/_/-}" "${!value}" \
    '[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?' 'lower-case letters, digits and -'
done
: "${opt_restarts:=100}"
valid restarts "$opt_restarts" '[0-9]+' 'a number'
check_labels "$opt_labels"
case $step in
  run | render)
    need topology 'which TPU, e.g. --topology=v5e:4x4'
    topology "$opt_topology"
    case $opt_via,$opt_topology in
      xpk,v5e:1x1 | xpk,v5e:2x2)
        die "xpk has no v5e slices below v5e:2x4: use --via=jobset"
        ;;
    esac
    need image 'the image with the code: build it from launch/Dockerfile'
    valid image "$opt_image" '[A-Za-z0-9][-A-Za-z0-9_./:@]*' 'one is NAME:TAG'
    check_train
    ;;
esac
secrets=$(secret_names)

place=()
[ -z "$opt_zone" ] || place+=("--zone=$opt_zone")
[ -z "$opt_project" ] || place+=("--project=$opt_project")
space=()
[ -z "$opt_namespace" ] || space+=("--namespace=$opt_namespace")
kube() { run kubectl "$@" ${space[@]+"${space[@]}"}; }

# A string of YAML. Kubernetes expands $(NAME) in arguments; $$ is a dollar.
yaml() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//$'\r'/\\r}
  case $text in
    *[[:cntrl:]]*) die "an argument has a control character: $(show "$1")" ;;
  esac
  printf '"%s"' "${text//\$/\$\$}"
}

render() {
  local line arguments argument labels='app: frugax' pair rest
  arguments=$(yaml "--workdir=$workdir")
  for argument in "${TRAIN[@]}"; do
    arguments+=", $(yaml "$argument")"
  done
  rest=${opt_labels:+$opt_labels,}
  while [ -n "$rest" ]; do
    pair=${rest%%,*}
    rest=${rest#*,}
    labels+=", '${pair%%=*}': '${pair#*=}'"
  done
  while IFS= read -r line; do
    case $line in
      *' # spot') [ -n "$opt_spot" ] || continue ;;
      *' # secret') [ -n "$secrets" ] || continue ;;
    esac
    line=${line//\$NAME/$opt_name}
    line=${line//\$LABELS/{$labels\}}
    line=${line//\$RESTARTS/$opt_restarts}
    line=${line//\$HOSTS/$HOSTS}
    line=${line//\$SERVICE_ACCOUNT/${opt_service_account:-default}}
    line=${line//\$GKE_CHIP/$GKE_CHIP}
    line=${line//\$SHAPE/${opt_topology#*:}}
    line=${line//\$IMAGE/$opt_image}
    line=${line//\$CHIPS/$CHIPS_A_HOST}
    line=${line//\$BUCKET/$bucket}
    # The last one: nothing in the arguments is a name.
    case $line in *'args: $ARGS') line=${line%\$ARGS}[$arguments] ;; esac
    printf '%s\n' "$line"
  done <"$ROOT/launch/jobset.yaml"
}

# For xpk, which puts the command on a line of a manifest, where Kubernetes
# expands $(NAME) as well; bash reads it in the end.
one_line() {
  local text
  text=$(quote "$@")
  text=${text//\$/\'\\\$\'}
  text=${text//$'\n'/\'\$\'\\n\'\'}
  printf '%s' "$text"
}

# By itself neither kubectl nor xpk waits for the pods, which are still to save.
delete_jobset() { kube delete jobset "$opt_name" --cascade=foreground --wait; }
delete_xpk() {
  run xpk workload delete "--cluster=$opt_cluster" "--workload=$opt_name" \
    ${place[@]+"${place[@]}"} --force
  kube wait pod "--selector=$JOBSET=$opt_name" --for=delete --timeout=300s
}

list_xpk() {
  run xpk workload list "--cluster=$opt_cluster" ${place[@]+"${place[@]}"} \
    "--filter-by-job=$opt_name"
}

# A job that has ended is in the way of the next: to create one of its name is
# an error, and to apply it once more changes nothing, and starts nothing.
make_room() {
  local ended get=(get jobset "$opt_name" --ignore-not-found)
  get+=('--output=jsonpath={.status.conditions[?(@.status=="True")].type}')
  if [ -n "$opt_dry_run" ]; then
    kube "${get[@]}"
    return
  fi
  ended=$(kube "${get[@]}")
  case " $ended " in
    *' Failed '* | *' Completed '*)
      note "the job $opt_name has ended ($ended): deleting it, to go on"
      "delete_$opt_via"
      ;;
  esac
}

run_jobset() {
  local name files=()
  make_room
  # One of an earlier run goes, even if this one has none.
  kube delete secret "$opt_name" --ignore-not-found
  if [ -n "$secrets" ]; then
    # A file for each, as a value may have several lines.
    for name in $secrets; do
      [ -n "$opt_dry_run" ] || printf '%s' "${!name}" >"$STAGE/$name"
      files+=("--from-file=$name=$STAGE/$name")
    done
    kube create secret generic "$opt_name" ${files[@]+"${files[@]}"}
  fi
  [ -n "$opt_dry_run" ] || render >"$STAGE/jobset.yaml"
  kube apply "--filename=$STAGE/jobset.yaml"
}

run_xpk() {
  local flags=("--max-restarts=$opt_restarts")
  flags+=(--termination-grace-period-seconds=120)
  [ -z "$opt_spot" ] || flags+=(--spot)
  # xpk makes its cluster that of kubectl.
  list_xpk
  make_room
  if [ -n "$secrets" ]; then
    # Names alone: xpk takes the values from its environment.
    [ -n "$opt_dry_run" ] || printf '%s\n' "$secrets" >"$STAGE/env"
    flags+=("--env-file=$STAGE/env")
  fi
  run xpk workload create "--cluster=$opt_cluster" "--workload=$opt_name" \
    ${place[@]+"${place[@]}"} "--tpu-type=$ACCELERATOR" \
    "--docker-image=$opt_image" "${flags[@]}" \
    "--command=cd /frugax && exec $(one_line bash \
      launch/local.sh "--workdir=$workdir" "${TRAIN[@]}")"
}

case $step in
  render) render ;;
  run)
    stage
    "run_$opt_via"
    ;;
  logs)
    labels=$JOBSET=$opt_name
    labels+=,batch.kubernetes.io/job-completion-index=0
    kube logs "--selector=$labels" --follow --tail=-1
    ;;
  report)
    if [ "$opt_via" = xpk ]; then
      list_xpk
    else
      kube get jobset "$opt_name"
    fi
    ;;
  down)
    "delete_$opt_via"
    [ "$opt_via" = xpk ] || kube delete secret "$opt_name" --ignore-not-found
    ;;
esac
