"""Translate a text.

python examples/python/translation.py checkpoints/translation data/libreoffice "Open the file."
"""

import sys

from fairseq.models.transformer import TransformerModel

folder, data, text = sys.argv[1:]
pieces = {"bpe": "sentencepiece", "sentencepiece_model": f"{data}/spm.model"}
translator = TransformerModel.from_pretrained(
    folder, "checkpoint_best.pt", f"{data}/bin", user_dir="fairseq_evomoe", **pieces
).eval()
print(translator.translate(text, beam=5))
