"""How numbers are kept: low precision, what rounding loses, averages."""
