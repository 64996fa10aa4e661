#!/bin/sh
# Train a translation model with EvoMoE through all phases, then translate the test set (BLEU).
#
#   examples/translation/train.sh DATA SAVE_DIR [more flags of fairseq-train]
#
# DATA is a folder made by fairseq-preprocess with a joined dictionary, such as the bin/ of
# `examples/data/prepare.py libreoffice OUT --target de` or `... bible OUT --target fr`.
# UPDATES (default 4000) scales all phases: the spawn at 10%, the anneal over 40%, top-1 from 58%.
# The gate is EvoMoE's as published; for another system add --moe-preset NAME (`evomoe presets` lists them).
set -eu
data=$1 save_dir=$2
shift 2
updates=${UPDATES:-4000} subset=${SUBSET:-test}
plugin=${EVOMOE_USER_DIR:-$(evomoe user-dir)}
. "$(dirname "$0")/../closing.sh"

fairseq-train "$data" --user-dir "$plugin" \
    --task translation --arch evomoe_transformer --share-all-embeddings \
    --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4 \
    --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4 \
    --encoder-normalize-before --decoder-normalize-before --dropout 0.1 \
    --moe-experts 4 --moe-freq 2 --moe-spawn-update 10% --moe-anneal-updates 40% --moe-hard-update 48% \
    --criterion evomoe_label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer adam --adam-betas "(0.9, 0.98)" --clip-norm 1.0 --lr 0.002 \
    --lr-scheduler inverse_sqrt --warmup-updates "$(part 10)" \
    --max-update "$updates" --max-tokens 2048 \
    --validate-interval-updates "$(part 8)" --no-epoch-checkpoints \
    --log-format json --log-interval "$(part 20)" --save-dir "$save_dir" "$@"

# no longer than 1.5 times the sentence and ten pieces more: a barely trained model would go on to the limit of 200
evaluated fairseq-generate "$data" --user-dir "$plugin" --path "$save_dir/checkpoint_best.pt" \
    --gen-subset "$subset" --beam 4 --batch-size 64 --required-batch-size-multiple 1 \
    --max-len-a 1.5 --max-len-b 10 --remove-bpe sentencepiece --scoring sacrebleu
closing "$(sed -n 's/.*\(BLEU[^=]* = .*\)/\1/p' "$save_dir/test.log" | tail -n 1)" \
    "translation.py $save_dir $prepared \"Open the file.\""
