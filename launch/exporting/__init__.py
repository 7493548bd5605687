"""What `launch/export.py` does: read a checkpoint, make the model, write the folder."""
