"""The two files that an exported moe_gpt folder carries; they import transformers and each other, nothing of this repository."""
