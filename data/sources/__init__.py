"""Inputs of any kind to documents."""
