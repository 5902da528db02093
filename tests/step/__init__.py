"""The gate of a step: scaling, clipping, skipping."""
