"""Loops of other packages, tested with the real ones."""
