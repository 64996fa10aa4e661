"""Checkpoints: the optimizer's state, whole and sharded files, merging, and the ``evomoe`` commands."""
