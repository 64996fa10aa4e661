#!/bin/sh
# Pretrain a masked language model with EvoMoE through all phases, then report its validation loss.
#
#   examples/masked_lm/train.sh DATA SAVE_DIR [more flags of fairseq-train]
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
    --task masked_lm --tokens-per-sample 64 --sample-break-mode none --mask-prob 0.15 \
    --arch evomoe_roberta --encoder-layers 4 --encoder-embed-dim 64 --encoder-ffn-embed-dim 128 \
    --encoder-attention-heads 4 --encoder-normalize-before --max-positions 256 \
    --dropout 0.1 --attention-dropout 0.0 \
    --moe-experts 8 --moe-freq 2 --moe-spawn-update 10% --moe-anneal-updates 40% --moe-hard-update 48% \
    --criterion evomoe_masked_lm \
    --optimizer adam --adam-betas "(0.9, 0.98)" --clip-norm 1.0 --lr 0.003 \
    --lr-scheduler polynomial_decay --warmup-updates "$(part 20)" \
    --total-num-update "$updates" --max-update "$updates" --batch-size 32 \
    --validate-interval-updates "$(part 8)" --no-epoch-checkpoints \
    --log-format json --log-interval "$(part 20)" --save-dir "$save_dir" "$@"

evaluated fairseq-validate "$data" --user-dir "$plugin" --task masked_lm --criterion evomoe_masked_lm \
    --path "$save_dir/checkpoint_best.pt" \
    --valid-subset "$subset" --batch-size 64 --required-batch-size-multiple 1 --log-format json
closing "perplexity $(last ppl)" "masked_lm.py $save_dir $prepared \"What is the <mask>\""
