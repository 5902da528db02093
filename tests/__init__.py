"""The tests, in folders as the code is; beside them what they share: cases, oracles, tolerances, ranks.

May import everything.
"""
