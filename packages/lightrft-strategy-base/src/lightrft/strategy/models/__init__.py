"""Models: preparing them, looking them up, and converting their weights to and from checkpoint names and layouts."""
