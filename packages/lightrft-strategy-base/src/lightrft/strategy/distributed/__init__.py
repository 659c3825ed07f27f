"""The ranks of a run: their process groups, what they are doing, and how they agree and exchange data."""
