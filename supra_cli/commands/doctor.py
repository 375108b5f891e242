"""`supra doctor`: what this machine has."""

from __future__ import annotations


def run() -> None:
    """Show what this machine offers: versions, devices, memory, kernels, hub."""
