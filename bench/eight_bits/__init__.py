"""What training with states in 8 bits comes to, and what they take (python -m bench.eight_bits)."""
