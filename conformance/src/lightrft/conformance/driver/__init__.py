"""The driver and its workers: a persistent group of processes, one per rank, that run programs."""
