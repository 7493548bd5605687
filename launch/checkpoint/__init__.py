"""Checkpoints: save, choose, load, convert."""
