#!/bin/sh
# Train a causal language model with EvoMoE through all phases, then evaluate it on the test set.
#
#   examples/language_modeling/train.sh DATA SAVE_DIR [more flags of fairseq-train]
#
# DATA is a folder made by fairseq-preprocess or examples/data/prepare.py (its bin/).
# UPDATES (default 4000) scales all phases: the spawn at 10%, the anneal over 40%, top-1 from 58%.
# The gate is EvoMoE's as published; for another system add --moe-preset NAME (`evomoe presets` lists them).
set -eu
data=$1 save_dir=$2
shift 2
updates=${UPDATES:-4000} subset=${SUBSET:-test}
plugin=${EVOMOE_USER_DIR:-$(evomoe user-dir)}
. "$(dirname "$0")/../closing.sh"

fairseq-train "$data" --user-dir "$plugin" \
    --task language_modeling --tokens-per-sample 64 --sample-break-mode none \
    --arch evomoe_lm --share-decoder-input-output-embed --decoder-normalize-before \
    --decoder-layers 4 --decoder-embed-dim 64 --decoder-input-dim 64 --decoder-output-dim 64 \
    --decoder-ffn-embed-dim 128 --decoder-attention-heads 4 --dropout 0.1 \
    --moe-experts 8 --moe-freq 2 --moe-spawn-update 10% --moe-anneal-updates 40% --moe-hard-update 48% \
    --criterion evomoe_cross_entropy \
    --optimizer adam --adam-betas "(0.9, 0.98)" --clip-norm 1.0 --lr 0.003 \
    --lr-scheduler polynomial_decay --warmup-updates "$(part 20)" \
    --total-num-update "$updates" --max-update "$updates" --batch-size 16 \
    --validate-interval-updates "$(part 8)" --no-epoch-checkpoints \
    --log-format json --log-interval "$(part 20)" --save-dir "$save_dir" "$@"

evaluated fairseq-eval-lm "$data" --user-dir "$plugin" --path "$save_dir/checkpoint_best.pt" \
    --gen-subset "$subset" --batch-size 64 --required-batch-size-multiple 1 \
    --tokens-per-sample 64 --context-window 0
closing "perplexity $(sed -n 's/.*Perplexity: //p' "$save_dir/test.log")" \
    "language_model.py $save_dir $prepared \"What is the king\""
