"""Uptraining: the loop, what it optimises with, and a run directory that survives being killed."""
