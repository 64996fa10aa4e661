# shellcheck shell=sh
# What the training scripts end with: which checkpoint, how good, in which phase, how long, and what to type next.
# They read this file, after `data`, `save_dir`, `updates` and `plugin` are set.
started=$(date +%s)
# fairseq causes a screenful of Hydra's and torch's
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
prepared=$(dirname "$data")  # of prepare.py, if it has made the data

# without a test set it is the validation set
has_test=
for file in "$data"/test* "$data"/*/test*; do
    [ ! -e "$file" ] || has_test=yes
done
[ -n "${SUBSET:-}$has_test" ] || subset=valid

# part N: of the updates one in N, at least one: fairseq divides by it
part() { echo $((updates < $1 ? 1 : updates / $1)); }

# evaluated COMMAND...: what it prints is in SAVE_DIR/test.log, and shown if it fails
evaluated() {
    echo "evaluating on $subset: $save_dir/test.log"
    "$@" > "$save_dir/test.log" 2>&1 || { tail -n 25 "$save_dir/test.log" && exit 1; }
}

# last NAME: a number of fairseq-validate's JSON
last() { grep -o "\"[a-z0-9_]*$1\": \"[0-9.]*\"" "$save_dir/test.log" | tail -n 1 | grep -o "[0-9.]*\"$" | tr -d "\""; }

# closing METRIC NEXT: METRIC is that of the test set, NEXT a script of examples/python with its last argument
closing() {
    evomoe=$(command -v evomoe || echo "$plugin/bin/evomoe")
    took=$(($(date +%s) - started))
    next="evomoe info $save_dir/checkpoint_best.pt"
    [ ! -e "$prepared/spm.model" ] || next="python examples/python/$2"
    echo
    echo "checkpoint    $save_dir/checkpoint_best.pt"
    # which may say nothing
    "$evomoe" info "$save_dir/checkpoint_best.pt" 2> /dev/null | grep -E '^(preset|update|stage) ' || true
    printf '%-13s %s\n' "$subset" "$1"
    echo "time          $((took / 60)) min $((took % 60)) s"
    echo "next          $next"
}
