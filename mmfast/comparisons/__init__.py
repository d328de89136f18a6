"""Comparisons from Python: any data, any model."""
