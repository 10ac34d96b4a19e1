"""Peers of pool, measured beside it: `python -m bench.peers` (or `make bench-peers`).

Each peer has an environment of its own and serves the same SavedModels by a small program of `servers/`;
they take turns, so that all are measured on the same machine in the same minutes.
"""
