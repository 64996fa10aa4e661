#!/usr/bin/env bash
# The plugin, uninstalled, as --user-dir of an existing setup: stock fairseq 0.12.2, torch 1.12.1, Python 3.10.
#
#   tests/existing_setup.sh [FOLDER]
#
# builds that environment in FOLDER (default: a temporary one; an environment that is there is used again),
# makes tiny data and trains through the spawn, resumes, fine-tunes a dense checkpoint, generates and evaluates.
# The interpreter is $PYTHON310, else python3.10, else pyenv's.
set -euo pipefail
# an installed copy of the plugin, or this folder on the path, would hide what is tested here
unset PYTHONPATH
export OMP_NUM_THREADS=1

here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
bin=$folder/venv/bin

say() { echo "[$(date +%H:%M:%S)] $*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
# run NAME COMMAND...: the output goes to NAME.log, the end of which is shown if the command fails
run() {
    local name=$1
    shift
    say "$name"
    "$@" >"$name.log" 2>&1 || { tail -n 25 "$name.log" >&2 && fail "$name, see $folder/$name.log"; }
}
same() { [ "$1" = "$2" ] && [ -n "$1" ] || fail "$3: '$1' and '$2' differ"; }

find_python() {
    local candidate
    for candidate in "${PYTHON310:-}" python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 10)' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10: set PYTHON310 to its path"
}

cd "$folder"
if ! "$bin/python" -c 'import fairseq, sacrebleu' 2>/dev/null; then
    python=$(find_python)
    run venv "$python" -m venv "$folder/venv"
    run install-torch "$bin/pip" install 'pip<24.1'
    run install-torch "$bin/pip" install 'numpy<1.24' 'cython<3' wheel 'setuptools<70' torch==1.12.1
    # torchaudio, which fairseq asks for in any version, would bring a newer torch
    run install-fairseq "$bin/pip" install fairseq==0.12.2 sacrebleu torch==1.12.1
fi
say "$("$bin/python" -c 'import fairseq, sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "fairseq", fairseq.__version__)' 2>/dev/null)"
"$bin/python" -c 'import fairseq_evomoe' 2>/dev/null && fail "fairseq_evomoe is installed in $folder/venv"

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
rm -rf lm mt runs
run preprocess-lm "$bin/fairseq-preprocess" --only-source --trainpref train.en --validpref valid.en \
    --testpref test.en --destdir lm --workers 1
run preprocess-mt "$bin/fairseq-preprocess" -s en -t de --trainpref train --validpref valid \
    --testpref test --destdir mt --workers 1

plugin="--user-dir $here/fairseq_evomoe --cpu"
training="$plugin --optimizer adam --lr 0.003 --batch-size 8 --seed 1 --log-format json --log-interval 10
    --num-workers 0 --no-epoch-checkpoints"
evolution="--moe-experts 4 --moe-spawn-update 20 --moe-anneal-updates 10 --moe-hard-update 12 --moe-balance-weight 0.01"
lm="lm $training $evolution --task language_modeling --arch evomoe_lm_tiny --criterion evomoe_cross_entropy
    --tokens-per-sample 32"
mlm="lm $training $evolution --task masked_lm --arch evomoe_roberta_tiny --criterion evomoe_masked_lm
    --tokens-per-sample 32 --moe-freq 2"
mt="mt $training --task translation --label-smoothing 0.1"
moe_mt="$mt $evolution --arch evomoe_transformer_tiny --criterion evomoe_label_smoothed_cross_entropy"

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
import sys

import torch

a, b = (torch.load(path)["model"] for path in sys.argv[1:])
assert a.keys() == b.keys(), set(a) ^ set(b)
noise = "_float_tensor"  # fairseq's marker of a device is never initialised
different = [key for key in a if not key.endswith(noise) and not torch.equal(a[key], b[key])]
assert not different, different
P
}

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
run ensemble "$bin/fairseq-generate" mt $plugin --beam 3 --batch-size 8 \
    --path runs/finetuned/checkpoint_last.pt:runs/mt2/checkpoint_last.pt
run interactive "$bin/fairseq-interactive" mt $plugin --path runs/finetuned/checkpoint_last.pt --input test.en
grep -q '^H-' interactive.log || fail "interactive: no hypothesis"
evomoe="$bin/python $here/fairseq_evomoe/bin/evomoe"
run doctor $evomoe doctor --user-dir "$here/fairseq_evomoe"
run info $evomoe info runs/finetuned/checkpoint_last.pt
grep -q 'saved with .*fairseq 0.12.2' info.log || fail "info: no versions"
say "the plugin works in stock fairseq 0.12.2"
