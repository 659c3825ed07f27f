"""Checkpoints: one format on disk for every strategy and every number of ranks.

`checkpoints.py` is where to begin reading; `layout.py` is the format.
"""
