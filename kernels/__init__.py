"""Triton kernels, installed as mmfast.kernels; mmfast.ops checks what they are given."""
