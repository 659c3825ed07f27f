"""Where weights are read from: each module reads one format of directories."""
