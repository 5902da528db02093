"""What the machine code of every kernel is like, read without a GPU: `python -m bench.static`."""
