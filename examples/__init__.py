"""Applications of `pool`, to run and to copy from."""
