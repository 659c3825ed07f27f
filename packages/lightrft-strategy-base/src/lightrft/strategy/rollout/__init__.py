"""Generating from a model in training: engines, prompts and completions, and the weights in between."""
