"""Classify a text by a masked language model that was fine-tuned.

python examples/python/classification.py checkpoints/reviews data/reviews "a film to remember"
"""

import sys

from fairseq.models.roberta import RobertaModel

folder, data, text = sys.argv[1:]
pieces = {"bpe": "sentencepiece", "sentencepiece_model": f"{data}/spm.model"}
roberta = RobertaModel.from_pretrained(
    folder, "checkpoint_best.pt", f"{data}/bin", user_dir="fairseq_evomoe", **pieces
).eval()
(logprob_C,) = roberta.predict("sentence_classification_head", roberta.encode(text))
labels = roberta.task.label_dictionary
print(f"{labels[labels.nspecial + int(logprob_C.argmax())]}, probability {logprob_C.max().exp():.2f}")
