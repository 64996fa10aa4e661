#!/usr/bin/env bash
# All that needs a GPU, in one command of at most eight minutes on one H100 or H200, without a network:
#
#     examples/benchmark/gpu.sh FOLDER [--quick]
#
# Layer with its candidates, routers, a whole update, profiles and other implementations (gpu.py), the tests on a
# GPU, and with the time that is left the training of quality/gpu.py. Results are written as they come; the same
# command goes on where it was cut, and with what time did not suffice for. DATA names the folder of the text (none:
# updates are of random words, and quality/gpu.py is left out), LIMIT the seconds in all (470), QUALITY further flags
# of quality/gpu.py. With --quick everything is small, also on a CPU.
set -u
folder=${1:?the folder of the results}
quick=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
end=$((SECONDS + ${LIMIT:-470}))
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$folder"
failed=0

python3 "$here/gpu.py" --out "$folder" --seconds $((${LIMIT:-470} * 7 / 10)) ${DATA:+--data "$DATA"} $quick || failed=1
if [ ! -e "$folder/tests.txt" ]; then
    workers=$(nvidia-smi >/dev/null 2>&1 && python3 -c 'import xdist' 2>/dev/null && echo "-n 12")
    (cd "$root" && timeout $((${LIMIT:-470} / 5)) python3 -m pytest -q -p no:cacheprovider $workers tests/test_gpu.py) \
        >"$folder/tests.tmp" 2>&1
    status=$?
    tail -n 3 "$folder/tests.tmp"
    if [ $status -eq 0 ]; then
        mv "$folder/tests.tmp" "$folder/tests.txt"
    else
        failed=1
        echo "gpu.sh: the tests failed or were cut (see $folder/tests.tmp): the same command runs them again" >&2
    fi
fi
if [ -n "${DATA:-}" ]; then
    # shellcheck disable=SC2086  # several flags
    python3 "$here/quality/gpu.py" "$DATA" --out "$folder" --seconds $((end - SECONDS)) ${QUALITY:-} $quick || failed=1
fi
exit $failed
