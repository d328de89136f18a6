"""Experiments: one run from data to figures, comparisons of methods over seeds, their tables and verdicts."""
