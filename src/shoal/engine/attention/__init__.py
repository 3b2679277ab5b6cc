"""Attention backends: one file each, chosen by name, not knowing each other."""
