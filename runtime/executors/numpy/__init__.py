"""The NumPy executor: the reference for every other, and the one that needs no GPU."""
