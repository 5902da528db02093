"""What one step works on: numbers, parameters with their gradients and states, the gate, shards and ranks.

May import storage, options and protocol. Knows no engine, and of an optimizer only `protocol.OptimizerLike`.
"""
