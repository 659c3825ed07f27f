"""Sequence parallelism (Ulysses): ranks that share the sequences of a batch; see `lightrft.strategy.parallel.sequence`."""
