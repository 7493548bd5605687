"""One training run: arguments, session, loop, metrics."""
