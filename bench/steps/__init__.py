"""Steps beside other packages' steps, and all that surrounds them: `pytest bench`."""
