"""Measurements of fusedopt, static and on a GPU."""
