"""`FusedOptimizer` as users meet it: arguments, errors, states, loops, and what may happen between two steps."""
