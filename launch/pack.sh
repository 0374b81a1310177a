#!/usr/bin/env bash
# Packs the working tree, with what is not committed and without what git
# ignores, into FILE.tgz. The last commit comes along, so that a run can tell
# which one it is of and whether the code differs from it.
#
#   launch/pack.sh FILE.tgz

set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "$0")/lib.sh"

(($# == 1)) || { usage && exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

git clone --quiet --depth=1 --no-checkout "file://$ROOT" "$folder/code"
# A snapshot by way of an index of its own; the user's is left alone.
export GIT_INDEX_FILE=$folder/index
git -C "$ROOT" add --all
tree=$(git -C "$ROOT" write-tree)
unset GIT_INDEX_FILE
git -C "$ROOT" archive "$tree" | tar -x -f - -C "$folder/code"
git -C "$folder/code" reset --quiet
git -C "$folder/code" remote remove origin
tar -c -z -f "$1" -C "$folder/code" .
