"""The ranks of a run: process groups, collectives, agreement, and errors about ranks that died."""
