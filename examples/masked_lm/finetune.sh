#!/bin/sh
# Fine-tune a masked language model (see train.sh) to classify sentences, as on GLUE.
#
#   examples/masked_lm/finetune.sh DATA PRETRAINED.pt SAVE_DIR [more flags of fairseq-train]
#
# DATA is a folder for fairseq's sentence_prediction task, such as the bin/ of
# `examples/data/prepare.py reviews OUT --vocabulary-from PRETRAINING_DATA`.
# The experts are there from the start and routing is top-1 throughout (spawn and hard update 0): a grown
# model would go on so without these flags, and a dense one has its experts spawned on loading.
# A model that was pretrained with a --moe-preset needs the same one here.
set -eu
data=$1 pretrained=$2 save_dir=$3
shift 3
updates=${UPDATES:-1500} subset=${SUBSET:-test}
plugin=${EVOMOE_USER_DIR:-$(evomoe user-dir)}
. "$(dirname "$0")/../closing.sh"

fairseq-train "$data" --user-dir "$plugin" --finetune-from-model "$pretrained" \
    --task sentence_prediction --num-classes 2 --init-token 0 --separator-token 2 \
    --shorten-method truncate --required-batch-size-multiple 1 \
    --arch evomoe_roberta --encoder-layers 4 --encoder-embed-dim 64 --encoder-ffn-embed-dim 128 \
    --encoder-attention-heads 4 --encoder-normalize-before --max-positions 256 \
    --dropout 0.1 --attention-dropout 0.0 --pooler-dropout 0.1 \
    --moe-experts 8 --moe-freq 2 --moe-spawn-update 0 --moe-hard-update 0 \
    --criterion evomoe_sentence_prediction \
    --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric \
    --optimizer adam --adam-betas "(0.9, 0.98)" --clip-norm 1.0 --weight-decay 0.01 --lr 0.001 \
    --lr-scheduler polynomial_decay --warmup-updates "$(part 15)" \
    --total-num-update "$updates" --max-update "$updates" --batch-size 32 \
    --no-epoch-checkpoints --no-last-checkpoints \
    --log-format json --log-interval "$(part 15)" --save-dir "$save_dir" "$@"

evaluated fairseq-validate "$data" --user-dir "$plugin" --task sentence_prediction --num-classes 2 \
    --criterion evomoe_sentence_prediction \
    --init-token 0 --separator-token 2 --path "$save_dir/checkpoint_best.pt" \
    --valid-subset "$subset" --batch-size 64 --required-batch-size-multiple 1 --log-format json
closing "accuracy $(last accuracy)" "classification.py $save_dir $prepared \"a film to remember\""
