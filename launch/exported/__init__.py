"""An exported folder as every command reads it: its files, then its model."""
