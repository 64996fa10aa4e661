"""The registered models: fairseq's own, with Mixture-of-Experts layers in place of feed-forward ones."""

from . import causal_lm, masked_lm, translation  # noqa: F401  (registers with fairseq)
