"""DeepSpeed: its JSON, its engine, and what is changed in it."""
