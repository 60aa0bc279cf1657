"""Triton kernels, one flat file per op. Nothing here is imported before an op asks for the Triton backend."""
