#!/usr/bin/env bash
# Every command of every page that a user reads, typed in a fresh checkout and a fresh environment, at toy scale.
#
#   tests/docs.sh FOLDER [PAGE ...]
#
# FOLDER gets the checkout (what is committed), logs/, results.jsonl and table.md. What has passed there is not run
# again, as long as its page has it; so the same command goes on after a cut. Pages are named as in the table.
# README.md comes first: its own line makes the environment. How commands are made small, and which cannot be run
# here, is said in tests/support/pages.py. PYTHON is the interpreter that README calls python3.
set -euo pipefail
[ $# -ge 1 ] || { echo "give a folder: tests/docs.sh FOLDER [PAGE ...]" >&2 && exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1/checkout"
folder=$(cd "$1" && pwd)
shift
git -C "$here" archive HEAD | tar -x -C "$folder/checkout"
"${PYTHON:-python3}" "$here/tests/support/pages.py" "$folder" "$@"
