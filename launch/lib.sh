# Shared by the launchers: sourced, never run. It keeps to what bash 3.2 knows,
# the version that macOS has.

# Else bash 5.2 finds a meaning in the & of a replacement.
shopt -u patsub_replacement 2>/dev/null || true

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What launch/local.sh exits with when a signal ended the run: it saved, and the
# same command goes on. Kubernetes and xpk take it for a reason to restart.
STOPPED=143

# Environment variables that are handed on without ever being shown.
SECRETS='WANDB_API_KEY HF_TOKEN'

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

note() {
  printf '%s\n' "$*" >&2
}

# The comment at the head of the script is its help.
usage() {
  sed -n -e '1d' -e '/^#SBATCH/d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
}

# Prints a command as one line that bash reads back word for word.
show() {
  local word line=''
  for word in "$@"; do
    case $word in
      *[[:cntrl:]]*) printf -v word %q "$word" ;;
      *) word=$(quote "$word") ;;
    esac
    line="$line $word"
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or with --dry-run shows it.
run() {
  if [ -n "$opt_dry_run" ]; then show "$@"; else "$@"; fi
}

# Quotes words for any POSIX shell: what another shell will read.
quote() {
  local word line='' escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*)
        word="'${word//\'/$escaped}'"
        ;;
    esac
    line="$line $word"
  done
  printf '%s' "${line# }"
}

# nearest WORD CANDIDATE...: the candidate with the fewest edits.
nearest() {
  local word=$1
  shift
  printf '%s\n' "$@" | awk -v word="$word" '
    function least(x, y, z) { return x<y ? (x<z ? x : z) : (y<z ? y : z) }
    {
      for (j = 0; j <= length($0); j++) d[0, j] = j
      for (i = 1; i <= length(word); i++) {
        d[i, 0] = i
        for (j = 1; j <= length($0); j++)
          d[i, j] = least(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + \
            (substr(word, i, 1) != substr($0, j, 1)))
      }
      distance = d[length(word), length($0)]
      if (NR == 1 || distance < best) { best = distance; name = $0 }
    }
    END { print name }'
}

# unknown KIND VALUE CANDIDATE...: the error for a name that does not exist.
unknown() {
  local kind=$1 value=$2
  shift 2
  die "unknown $kind '$value': did you mean '$(nearest "$value" "$@")'?" \
    "Valid: $*"
}

# parse 'name= label+ spot' ARGUMENT...: --name=X, or --name X, sets opt_name,
# every --label=X adds to the array opt_label, and --spot sets opt_spot to 1.
# --config..., and all that follows --, is the trainer's and goes to TRAIN.
parse() {
  local spec item key value names=()
  spec=${1//$'\n'/ }
  spec+=' dry-run'
  shift
  TRAIN=()
  for item in $spec; do
    key=opt_${item%[=+]}
    case $item in
      *+) eval "${key//-/_}=()" ;;
      *) printf -v "${key//-/_}" '' ;;
    esac
    names+=("--${item%[=+]}")
  done
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        TRAIN+=("$@")
        return
        ;;
      --config=* | --config.*=*)
        TRAIN+=("$1")
        shift
        continue
        ;;
      --config | --config.*)
        (($# > 1)) || die "$1 needs a value: $1=VALUE"
        TRAIN+=("$1" "$2")
        shift 2
        continue
        ;;
      --*) ;;
      *) die "unexpected argument '$1'; see $0 --help" ;;
    esac
    key=${1%%=*}
    key=${key#--}
    case " $spec " in
      *" $key "*)
        [ "$1" = "--$key" ] || die "--$key takes no value, '$1' has one"
        printf -v "opt_${key//-/_}" 1
        shift
        continue
        ;;
      *" $key= "* | *" $key+ "*) ;;
      *) unknown option "${1%%=*}" "${names[@]}" ;;
    esac
    if [ "$1" = "--$key" ]; then
      (($# > 1)) || die "--$key needs a value: --$key=VALUE"
      value=$2
      shift
    else
      value=${1#*=}
    fi
    shift
    [ -n "$value" ] || die "--$key is empty; give it a value or leave it out"
    case " $spec " in
      *" $key+ "*) eval "opt_${key//-/_}+=(\"\$value\")" ;;
      *) printf -v "opt_${key//-/_}" '%s' "$value" ;;
    esac
  done
}

# need OPTION WHY: dies unless the option was given.
need() {
  local name=opt_${1//-/_}
  [ -n "${!name}" ] || die "--$1 is missing: $2; see $0 --help"
}

# valid WHAT VALUE REGEX RULE: dies unless all of the value matches.
valid() {
  local pattern="^($3)\$"
  # A newline would end the pattern's line.
  case $2 in *$'\n'*) die "$1 '$2' is not valid: $4" ;; esac
  [[ $2 =~ $pattern ]] || die "$1 '$2' is not valid: $4"
}

# The arguments of the trainer: a config must be among them, no workdir.
check_train() {
  local argument config=''
  for argument in ${TRAIN[@]+"${TRAIN[@]}"}; do
    case $argument in
      --config | --config=*) config=1 ;;
      --workdir | --workdir=*)
        die "give $argument before the --, as an option of $0"
        ;;
    esac
  done
  [ -n "$config" ] ||
    die "no config: add --config=configs/llama.py:size=60m,opt=galore"
}

# Whether the run reads Python's own standard library, which every machine has
# and which is written as a data set before the first step.
reads_stdlib() {
  local word before='' name=stdlib own=''
  for word in "${TRAIN[@]}"; do
    # In two words it is the same.
    case $before in --config.*=*) ;; --config.*) word=$before=$word ;; esac
    before=$word
    case $word in
      --config.data.data_dir*) return 1 ;;
      --config.data.name=*) own=${word#*=} ;;
      *data=stdlib*) name=stdlib ;;
      --config=*data=* | *.py*data=*) name=another ;;
    esac
  done
  [ "${own:-$name}" = stdlib ]
}

# The interpreter that trains.
interpreter() {
  local venv=$ROOT/.venv/bin/python
  if [ -n "${PYTHON:-}" ]; then
    printf '%s' "$PYTHON"
  elif [ -x "$venv" ]; then
    printf '%s' "$venv"
  else
    printf 'python3'
  fi
}

# summary_time PYTHON WORKDIR: when the summary was written, which a run does
# whose last step is done. One that was stopped exits with 0 as well, and leaves
# the file as it was.
summary_time() {
  "$1" -c 'import os, sys
print(os.path.isfile(sys.argv[1]) and os.stat(sys.argv[1]).st_mtime_ns)' \
    "$2/summary.json"
}

# wait_for PID: its status, however many signals are trapped meanwhile.
wait_for() {
  local status again
  while :; do
    status=0
    wait "$1" || status=$?
    kill -0 "$1" 2>/dev/null || break
  done
  # That of a signal may be of one that was trapped just before the child ended.
  # (127, or -1: bash knows no other of it, as when the signal ended both.)
  if ((status > 128)); then
    again=0
    wait "$1" 2>/dev/null || again=$?
    ((again == 127 || again < 0)) || status=$again
  fi
  return "$status"
}

# tend COMMAND...: its status; what `forward` is told of goes to it as SIGTERM,
# and if that was before, nothing is started. (A child of a script ignores the
# Ctrl-C of a terminal until it asks for it.)
asked='' child=''
forward() {
  asked=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
tend() {
  [ -z "$asked" ] || return "$STOPPED"
  "$@" &
  child=$!
  [ -z "$asked" ] || forward
  wait_for "$child"
}

# check_workdir: dies where a .. leads out of the bucket, or anywhere.
check_workdir() {
  case /$opt_workdir/ in
    */../* | */./*)
      die "workdir '$opt_workdir' is not valid: give it without . and .."
      ;;
  esac
}

# check_labels 'KEY=VALUE,...': as Google Cloud and Kubernetes take them.
check_labels() {
  local pair rest=${1:+$1,}
  while [ -n "$rest" ]; do
    pair=${rest%%,*}
    rest=${rest#*,}
    valid label "$pair" '[a-z][-_a-z0-9]{0,62}=[-_a-z0-9]{0,63}' \
      'KEY=VALUE of lower-case letters, digits, - and _, 63 of each at most'
  done
}

# The secrets that are set, by name: those known and those of --secret, once.
secret_names() {
  local name seen=" $SECRETS "
  for name in $SECRETS; do
    if [ -n "${!name:-}" ]; then printf '%s\n' "$name"; fi
  done
  for name in ${opt_secret[@]+"${opt_secret[@]}"}; do
    valid secret "$name" '[A-Za-z_][A-Za-z0-9_]*' \
      'give the name of an environment variable, not its value'
    [ -n "${!name:-}" ] ||
      die "secret $name is not set; export it first, or leave --secret out"
    case $seen in *" $name "*) continue ;; esac
    seen+="$name "
    printf '%s\n' "$name"
  done
}

# write_secrets FILE: for a shell that reads it.
write_secrets() {
  local name
  (
    umask 077
    : >"$1"
    for name in $(secret_names); do
      printf 'export %s=%s\n' "$name" "$(quote "${!name}")" >>"$1"
    done
  )
}

# The options of launch/tpu_vm.sh, which launch/tpu_babysit.sh has as well.
TPU_OPTIONS='topology= zone= project= name= workdir= spot queue labels=
  runtime= create-flag+ commit= repo= extras= secret+ detach'

# A private folder on this machine for what is sent to others, which goes when
# the script ends: secrets may be in it.
stage() {
  STAGE=${XDG_CACHE_HOME:-$HOME/.cache}/frugax/launch/$opt_name
  if [ -z "$opt_dry_run" ]; then
    rm -rf "$STAGE"
    (umask 077 && mkdir -p "$STAGE")
    trap 'rm -rf "$STAGE"' EXIT
  fi
}

# What was sent; another call with the same name may have its own by the end.
unstage() {
  if [ -z "$opt_dry_run" ]; then
    rm -rf "$STAGE"
    trap - EXIT
  fi
}

# A name for machines and jobs: the last part of the workdir, and a sum of the
# whole, which tells adamw/1b from galore/1b.
default_name() {
  local clean sum
  clean=$(basename "$1" | tr -d '\n' | tr '[:upper:]' '[:lower:]' |
    LC_ALL=C tr -c 'a-z0-9' '-')
  clean=${clean:0:24}
  sum=$(printf '%s' "${1%/}" | cksum)
  printf 'frugax-%s-%08x' "${clean%-}" "${sum%% *}"
}

FLAT='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
CUBE='2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16'
CUBE="$CUBE 16x16x16"

# topology CHIP:SHAPE, the planner's name of a TPU slice. Sets
#   CHIPS, HOSTS and CHIPS_A_HOST
#   ACCELERATOR  its type for gcloud and xpk, which count chips or cores
#   RUNTIME      the image of a TPU VM; empty where there are none
#   GKE_CHIP     the label of its nodes
topology() {
  local chip=${1%%:*} shape=${1#*:} shapes item all=()
  for item in $FLAT; do all+=("v5e:$item" "v6e:$item"); done
  for item in $CUBE; do all+=("v4:$item" "v5p:$item" "tpu7x:$item"); done
  case $chip in
    v5e | v6e) shapes=$FLAT ;;
    v4 | v5p | tpu7x) shapes=$CUBE ;;
    *)
      die "unknown topology '$1': did you mean" \
        "'$(nearest "$1" "${all[@]}")'? Chips: v4, v5e, v5p, v6e, tpu7x"
      ;;
  esac
  case " $shapes " in
    *" $shape "*) ;;
    *)
      # shellcheck disable=SC2086
      die "unknown topology '$1': did you mean" \
        "'$chip:$(nearest "$shape" $shapes)'? Shapes of $chip: $shapes"
      ;;
  esac
  CHIPS=$((${shape//x/ * }))
  if [ "$shapes" = "$FLAT" ] && ((CHIPS <= 8)); then
    CHIPS_A_HOST=$CHIPS
  else
    CHIPS_A_HOST=4
  fi
  HOSTS=$((CHIPS / CHIPS_A_HOST))
  case $chip in
    v4)
      ACCELERATOR=v4-$((2 * CHIPS)) RUNTIME=tpu-ubuntu2204-base
      GKE_CHIP=tpu-v4-podslice
      ;;
    v5e)
      ACCELERATOR=v5litepod-$CHIPS RUNTIME=v2-alpha-tpuv5-lite
      GKE_CHIP=tpu-v5-lite-podslice
      ;;
    v5p)
      ACCELERATOR=v5p-$((2 * CHIPS)) RUNTIME=v2-alpha-tpuv5
      GKE_CHIP=tpu-v5p-slice
      ;;
    v6e)
      ACCELERATOR=v6e-$CHIPS RUNTIME=v2-alpha-tpuv6e
      GKE_CHIP=tpu-v6e-slice
      ;;
    tpu7x)
      ACCELERATOR=tpu7x-$((2 * CHIPS)) RUNTIME=''
      GKE_CHIP=tpu7x
      ;;
  esac
}
