"""Go on with a text, and score it, by a causal language model.

python examples/python/language_model.py checkpoints/lm data/shakespeare "What is the king"
"""

import sys

from fairseq.models.transformer_lm import TransformerLanguageModel

folder, data, text = sys.argv[1:]
pieces = {"bpe": "sentencepiece", "sentencepiece_model": f"{data}/spm.model"}
lm = TransformerLanguageModel.from_pretrained(
    folder, "checkpoint_best.pt", f"{data}/bin", user_dir="fairseq_evomoe", **pieces
).eval()
print(lm.sample(text, sampling=True, sampling_topk=10, max_len_b=20))
print(f"perplexity {lm.score(text)['positional_scores'].mean().neg().exp():.1f}")
