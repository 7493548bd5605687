"""What is left out of the data."""
