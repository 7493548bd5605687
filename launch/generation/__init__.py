"""What `launch/generate.py` does: prompts to token ids, token ids to text, text to the terminal."""
