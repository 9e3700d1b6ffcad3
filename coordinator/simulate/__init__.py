"""A virtual fleet on a virtual clock: the real round, the real algorithms and the real worker function, without a network."""
