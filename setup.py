"""Packages are listed by hand: a top-level `kernels` in site-packages would collide with the package of that name."""

from setuptools import setup

setup(
    packages=[
        "fusedopt",
        "fusedopt.rules",
        "fusedopt.matrices",
        "fusedopt.engines",
        "fusedopt.step",
        "fusedopt.storage",
        "fusedopt.textbook",
        "fusedopt.kernels",
        "fusedopt.kernels.cpu",
        "fusedopt.kernels.rules",
    ],
    package_dir={"fusedopt": "fusedopt", "fusedopt.kernels": "kernels"},
    package_data={"fusedopt": ["py.typed"]},
)
