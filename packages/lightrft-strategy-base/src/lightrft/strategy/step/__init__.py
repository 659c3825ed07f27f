"""One update: accumulation, gradients, schedules, averages."""
