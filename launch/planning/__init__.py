"""What a training run will need and take, by arithmetic: no GPU, no data and no torch."""
