#!/usr/bin/env bash
# The plugin, uninstalled, as --user-dir of every environment that can be had here; and the table of README.md.
#
#   tests/versions.sh [--whole] FOLDER [NAME ...]    # all of ENVIRONMENTS, or those named
#   tests/versions.sh --table FOLDER                 # the table again, of what has been tried in FOLDER
#
# Each environment is built in FOLDER/NAME/venv and tried in FOLDER/NAME/trial on data that are made up: trainings
# through the spawn, resumed bit for bit, evaluated, translated. With --whole, and always with the oldest, also two
# ranks, masked LMs, fine-tuning and the evomoe commands. A cut costs no more than the trial that it cuts: what has
# a line in FOLDER/NAME/row is not tried again, and a built environment is used again. Delete what to repeat.
#
# Pythons are found as python3.X, or pyenv's; PYTHON names a folder with others, as python3.X.
# FAIRSEQ names a fairseq source folder, for the Pythons that have no wheel.
set -euo pipefail
# an installed copy of the plugin, or this folder on the path, would hide what is tested here
unset PYTHONPATH
export OMP_NUM_THREADS=1

# name, Python, since which version of the plugin, how README says it is installed
ENVIRONMENTS='
py3.9-old       | 3.9  | 0.2 | `pip install "pip<24.1"`, then `fairseq==0.12.2 torch==1.12.1 "numpy<1.24"`
py3.10-old      | 3.10 | 0.1 | the same
py3.11          | 3.11 | 0.1 | `pip install torch==2.13.0 ve-fairseq==0.12.3`
py3.11-numpy1   | 3.11 | 0.2 | the same, and `"numpy<2"`
py3.11-newest   | 3.11 | 0.2 | `pip install torch ve-fairseq==0.12.3`
py3.12          | 3.12 | 0.2 | `pip install torch==2.13.0 ve-fairseq==0.12.3`
py3.13          | 3.13 | 0.2 | no wheels: [a fairseq folder](examples/troubleshooting.md#which-fairseq)
py3.14          | 3.14 | 0.2 | no wheels: the same, and one line
'

here=$(cd "$(dirname "$0")/.." && pwd)
say() { echo "[$(date +%H:%M:%S)] $*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
# field NAME NUMBER: of ENVIRONMENTS
field() { awk -F ' *[|] *' -v name="$1" -v number="$2" '$1 == name { print $number }' <<<"$ENVIRONMENTS"; }
names() { awk -F ' *[|] *' 'NF { print $1 }' <<<"$ENVIRONMENTS"; }

# table FOLDER: a row for each environment
table() {
    local name
    echo "| Python | torch | fairseq | numpy | hydra | works | since | how |"
    echo "|---|---|---|---|---|---|---|---|"
    for name in $(names); do
        if [ -e "$1/$name/row" ]; then
            echo "| $(cat "$1/$name/row") | $(field "$name" 3) | $(field "$name" 4) |"
        elif grep -q ^FAILED "$1/$name/log" 2>/dev/null; then
            echo "| $(field "$name" 2) | | | | | no: $(sed -n 's/^FAILED: \([^,]*\).*/\1/p' "$1/$name/log") | | $(field "$name" 4) |"
        else
            echo "| $(field "$name" 2) | | | | | not run | | $(field "$name" 4) |"
        fi
    done
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}/python$1" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if "$candidate" -c "import sys, venv, ensurepip; assert '%d.%d' % sys.version_info[:2] == '$1'" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# build NAME: what is installed. What has no fairseq of its own on PyPI takes a folder of it, without its wishes.
build() {
    local pip=$bin/pip
    case $1 in
    *-old)
        run install-pip "$pip" install 'pip<24.1'
        run install-torch "$pip" install 'numpy<1.24' 'cython<3' wheel 'setuptools<70' torch==1.12.1
        # torchaudio, which fairseq asks for in any version, would bring a newer torch
        run install-fairseq "$pip" install fairseq==0.12.2 sacrebleu torch==1.12.1
        ;;
    py3.13 | py3.14)
        run install-torch "$pip" install torch==2.13.0 numpy setuptools wheel 'cython<3.1'
        run install-needs "$pip" install cffi hydra-core omegaconf regex sacrebleu tqdm bitarray scikit-learn packaging
        run install-fairseq "$pip" install --no-deps --no-build-isolation "${FAIRSEQ:-fairseq-fixed}"
        if [ "$1" = py3.14 ]; then # as examples/troubleshooting.md says it
            sed -i 's/or typestring.startswith("typing.Optional")/& or typestring.endswith(" | None")/' \
                "$("$bin/python" -c 'import importlib.util as u; print(u.find_spec("fairseq").submodule_search_locations[0])')/dataclass/utils.py"
        fi
        ;;
    *)
        local torch=torch==2.13.0 numpy=numpy
        [ "$1" = py3.11-numpy1 ] && numpy='numpy<2'
        [ "$1" = py3.11-newest ] && torch=torch
        run install-torch "$pip" install "$torch"
        run install-fairseq "$pip" install ve-fairseq==0.12.3 "$numpy"
        ;;
    esac
}

# one NAME WHOLE: builds it and tries it, and writes its row
one() {
    local python
    mkdir -p "$folder/trial" && cd "$folder/trial"
    if ! "$bin/python" -c 'import fairseq, sacrebleu' 2>/dev/null; then
        python=$(find_python "$(field "$1" 2)") || { say "$1: no Python $(field "$1" 2)" && return; }
        run venv "$python" -m venv "$folder/venv"
        build "$1"
    fi
    "$bin/python" -c 'import fairseq_evomoe' 2>/dev/null && fail "fairseq_evomoe is installed in $folder/venv"
    "$bin/python" - >versions 2>versions.log <<'P' || { tail -n 5 versions.log >&2 && fail "fairseq cannot be imported"; }
import importlib.metadata
import sys

import fairseq
import hydra
import numpy
import torch

installed = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
(fork,) = installed & {"fairseq", "ve-fairseq", "ve_fairseq", "fairseq-fixed", "fairseq_fixed", "fairseq-built"}
print("%d.%d.%d" % sys.version_info[:3], torch.__version__, end=" ")
print(f"{fork.replace('_', '-')}~{fairseq.__version__}", numpy.__version__, hydra.__version__)
P
    say "$1: $(cat versions)"
    try "$2"
    tr ' ~' '| ' <versions | sed 's/|/ | /g; s/$/ | yes/' >"$folder/row"
}

# run NAME COMMAND...: the output goes to NAME.log, the end of which is shown if the command fails
run() {
    local name=$1
    shift
    say "$name"
    "$@" >"$name.log" 2>&1 || { tail -n 25 "$name.log" >&2 && fail "$name, see $PWD/$name.log"; }
}
same() { [ "$1" = "$2" ] && [ -n "$1" ] || fail "$3: '$1' and '$2' differ"; }

# train NAME UPDATES OPTIONS...
train() {
    local name=$1 updates=$2
    shift 2
    run "$name" "$bin/fairseq-train" "$@" --max-update "$updates" --save-dir "runs/$name"
}
spawned() { grep -q 'spawned experts before update 20: 1 -> 4 experts' "$1.log" || fail "$1: nothing spawned"; }
# what training and fairseq-validate say of the last checkpoint: the loss
last_loss() { grep -o '"valid_loss": "[0-9.]*"' "$1.log" | tail -n 1 | grep -o '[0-9.]*'; }
validate_loss() { grep -o '| loss [0-9.]*' "$1.log" | tail -n 1 | grep -o '[0-9.]*'; }
# validate NAME DATA OPTIONS...
validate() {
    local name=$1 data=$2
    shift 2
    run "$name.validate" "$bin/fairseq-validate" "$data" $plugin --path "runs/$name/checkpoint_last.pt" \
        --valid-subset valid --batch-size 8 "$@"
    same "$(last_loss "$name")" "$(validate_loss "$name.validate")" "$name: loss in training and after loading"
}
# the parameters of two checkpoints, bit by bit
equal() {
    run "$1-equal" "$bin/python" - "$2" "$3" <<'P'
import inspect
import sys

import torch

whole = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}
a, b = (torch.load(path, **whole)["model"] for path in sys.argv[1:])
assert a.keys() == b.keys(), set(a) ^ set(b)
noise = "_float_tensor"  # fairseq's marker of a device is never initialised
different = [key for key in a if not key.endswith(noise) and not torch.equal(a[key], b[key])]
assert not different, different
P
}

# try WHOLE: trains and evaluates in this folder; everything, if WHOLE is not empty
try() {
    rm -rf lm mt runs
    run data "$bin/python" - <<'P'
import random

draw = random.Random(1)
for split, number in (("train", 320), ("valid", 40), ("test", 40)):
    with open(split + ".en", "w") as english, open(split + ".de", "w") as german:
        for _ in range(number):
            words = ["w%d" % draw.randrange(20) for _ in range(draw.randint(2, 9))]
            english.write(" ".join(words) + "\n")
            german.write(" ".join("x" + word for word in words) + "\n")
P
    run preprocess-lm "$bin/fairseq-preprocess" --only-source --trainpref train.en --validpref valid.en \
        --testpref test.en --destdir lm --workers 1
    run preprocess-mt "$bin/fairseq-preprocess" -s en -t de --trainpref train --validpref valid \
        --testpref test --destdir mt --workers 1

    # ve-fairseq would leave out the blocks that are over a multiple of 8, in the last batch
    plugin="--user-dir $here/fairseq_evomoe --cpu --required-batch-size-multiple 1"
    training="$plugin --optimizer adam --lr 0.003 --batch-size 8 --seed 1 --log-format json --log-interval 10
        --num-workers 0 --no-epoch-checkpoints"
    evolution="--moe-experts 4 --moe-spawn-update 20 --moe-anneal-updates 10 --moe-hard-update 12 --moe-balance-weight 0.01"
    lm="lm $training $evolution --task language_modeling --arch evomoe_lm_tiny --criterion evomoe_cross_entropy
        --tokens-per-sample 32"
    mlm="lm $training $evolution --task masked_lm --arch evomoe_roberta_tiny --criterion evomoe_masked_lm
        --tokens-per-sample 32 --moe-freq 2"
    mt="mt $training --task translation --label-smoothing 0.1"
    moe_mt="$mt $evolution --arch evomoe_transformer_tiny --criterion evomoe_label_smoothed_cross_entropy"

    train lm 40 $lm --save-interval-updates 10
    spawned lm
    for update in 10 30; do # before and after the spawn
        train "lm-from-$update" 40 $lm --restore-file "$(echo runs/lm/checkpoint_*_$update.pt)"
        equal "lm-from-$update" runs/lm/checkpoint_last.pt "runs/lm-from-$update/checkpoint_last.pt"
    done
    spawned lm-from-10
    validate lm lm --task language_modeling
    run eval-lm "$bin/fairseq-eval-lm" lm $plugin --path runs/lm/checkpoint_last.pt --gen-subset valid --batch-size 8 \
        --tokens-per-sample 32
    same "$(last_loss lm)" "$(grep -o 'Loss (base 2): [0-9.]*' eval-lm.log | grep -o '[0-9.]*$' |
        xargs printf '%.3f')" "eval-lm"

    train dense 120 $mt --arch transformer_iwslt_de_en --criterion label_smoothed_cross_entropy --encoder-layers 2 \
        --decoder-layers 2 --encoder-embed-dim 64 --decoder-embed-dim 64 --encoder-ffn-embed-dim 128 \
        --decoder-ffn-embed-dim 128 --encoder-attention-heads 2 --decoder-attention-heads 2
    train finetuned 240 $moe_mt --finetune-from-model runs/dense/checkpoint_last.pt
    spawned finetuned
    for size in 1 32; do
        run "generate-$size" "$bin/fairseq-generate" mt $plugin --path runs/finetuned/checkpoint_last.pt --beam 3 \
            --batch-size $size --scoring sacrebleu
        grep '^H-' "generate-$size.log" | cut -f 1,3 | sort >"hypotheses-$size"
    done
    same "$(cat hypotheses-1)" "$(cat hypotheses-32)" "hypotheses at batch size 1 and 32"
    say "$(tail -n 1 generate-32.log)"
    tail -n 1 generate-32.log | grep -q 'BLEU = [1-9]' || fail "generate: no BLEU"
    [ -z "$1" ] && return

    # two ranks that share the experts; one process evaluates their checkpoint in two files, and goes on from it
    run ranks "$bin/torchrun" --standalone --nproc_per_node 2 "$bin/fairseq-train" $lm --max-update 30 \
        --save-dir runs/ranks --distributed-world-size 2 --distributed-backend gloo --ddp-backend legacy_ddp \
        --moe-expert-parallel 2 --moe-sharded-checkpoint
    spawned ranks
    [ -e runs/ranks/checkpoint_last-experts1.pt ] || fail "ranks: no second file"
    validate ranks lm --task language_modeling
    train ranks-on-one 40 $lm --restore-file runs/ranks/checkpoint_last.pt
    grep -q '"num_updates": "40"' ranks-on-one.log || fail "ranks-on-one: it did not go on"

    train mlm 30 $mlm
    spawned mlm
    validate mlm lm --task masked_lm

    # post-norm layers are those that fairseq 0.12.2 has a fast path for
    for freq in 1 2; do
        train "mt$freq" 40 $moe_mt --moe-freq $freq --save-interval-updates 10
        spawned "mt$freq"
        validate "mt$freq" mt --task translation
    done
    train mt-from-30 40 $moe_mt --moe-freq 2 --restore-file "$(echo runs/mt2/checkpoint_*_30.pt)"
    equal mt-from-30 runs/mt2/checkpoint_last.pt runs/mt-from-30/checkpoint_last.pt
    train prenorm 30 $moe_mt --encoder-normalize-before --decoder-normalize-before
    validate prenorm mt --task translation

    run ensemble "$bin/fairseq-generate" mt $plugin --beam 3 --batch-size 8 \
        --path runs/finetuned/checkpoint_last.pt:runs/mt2/checkpoint_last.pt
    run interactive "$bin/fairseq-interactive" mt $plugin --path runs/finetuned/checkpoint_last.pt --input test.en
    grep -q '^H-' interactive.log || fail "interactive: no hypothesis"
    evomoe="$bin/python $here/fairseq_evomoe/bin/evomoe"
    run doctor $evomoe doctor --user-dir "$here/fairseq_evomoe"
    run info $evomoe info runs/finetuned/checkpoint_last.pt
    grep -q "saved with .*fairseq $(cut -d '~' -f 2 versions | cut -d ' ' -f 1)" info.log || fail "info: no versions"
}

whole=
case ${1:-} in
--table) table "$2" && exit ;;
--whole) whole=yes && shift ;;
--one) # NAME FOLDER WHOLE, in a process of its own, so that an error ends this environment alone
    folder=$3
    bin=$folder/venv/bin
    one "$2" "$4"
    exit
    ;;
esac
[ $# -ge 1 ] || fail "give a folder: tests/versions.sh [--whole] FOLDER [NAME ...]"
mkdir -p "$1"
top=$(cd "$1" && pwd)
shift
chosen=${*:-$(names)}
for name in $chosen; do
    [ -n "$(field "$name" 2)" ] || fail "no environment $name, but $(names | xargs)"
done
failed=
for name in $chosen; do
    [ -e "$top/$name/row" ] && say "$name: tried already" && continue
    mkdir -p "$top/$name"
    [ "$name" = py3.10-old ] && all=yes || all=$whole
    bash "$0" --one "$name" "$top/$name" "$all" 2>&1 | tee "$top/$name/log" || failed="$failed $name"
done
table "$top"
[ -z "$failed" ] || fail "$failed"
