"""The measurements behind the README's figures: `python -m bench` (or `make bench`).

Each figure is a ratio or a count taken in one run: what it is compared with is measured in the same
minutes, alternating, and medians are quoted, because the machine's speed drifts.
"""
