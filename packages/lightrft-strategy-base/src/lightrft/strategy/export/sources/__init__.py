"""Where weights are read from: each module knows one kind of directory."""
