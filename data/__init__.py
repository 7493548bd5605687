"""Source code in, packed training samples out: `python data/preprocess.py` makes shards, `PackedDataset` serves them."""
