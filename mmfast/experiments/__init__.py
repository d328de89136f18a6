"""Experiments: one run from data to figures, runs over seeds, trials of settings, and what they support."""
