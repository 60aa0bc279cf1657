"""Autoencoders: one published idea per file."""
