"""Experts inside a running fairseq ``Trainer``: hooks, growth, ranks and checks."""
