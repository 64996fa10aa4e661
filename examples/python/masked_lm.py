"""Fill a gap in a text, and get the vector of each of its pieces, by a masked language model.

python examples/python/masked_lm.py checkpoints/mlm data/shakespeare "What is the <mask>"
"""

import sys

from fairseq.models.roberta import RobertaModel

folder, data, text = sys.argv[1:]
pieces = {"bpe": "sentencepiece", "sentencepiece_model": f"{data}/spm.model"}
roberta = RobertaModel.from_pretrained(
    folder, "checkpoint_best.pt", f"{data}/bin", user_dir="fairseq_evomoe", **pieces
).eval()
for filled, probability, _ in roberta.fill_mask(text, topk=3):
    print(f"{probability:.3f} {filled}")
print("vectors", *roberta.extract_features(roberta.encode(text)).shape)
