"""Checkpoints: one format on disk for every strategy and every number of ranks.

Begin with `save_checkpoint.py` and `load_checkpoint.py`; `format.py` defines the format.
"""
