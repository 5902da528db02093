"""How numbers are kept: dtypes, rounding, which states there are, averages, what a loaded state becomes.

May import options and protocol.
"""
