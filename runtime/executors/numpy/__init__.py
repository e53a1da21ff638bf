"""The NumPy executor: the reference for the others; needs no GPU."""
