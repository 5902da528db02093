"""Device code: numbers, bytes moved, machine code, rounding."""
