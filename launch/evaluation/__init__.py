"""Judging a model: loss and bits per byte on shards, and pass@k by running what it writes."""
