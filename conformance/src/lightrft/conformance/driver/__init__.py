"""The driver and its workers: a persistent group of processes, one a rank, that run programs."""
