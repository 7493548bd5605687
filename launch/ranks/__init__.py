"""The ranks as a group: joining, agreeing, watching."""
