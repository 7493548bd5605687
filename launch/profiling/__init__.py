"""`--profile N`: a trace of some steps, and a table of where they go."""
