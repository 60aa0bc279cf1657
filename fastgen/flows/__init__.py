"""Normalizing flows: one published idea per file."""
