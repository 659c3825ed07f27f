"""The ranks of a run: process groups, collectives, agreement, and errors of lost peers."""
