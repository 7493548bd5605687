"""Programs that run within the sandbox, in a fresh interpreter with nothing but the standard library.

Their text is handed to the interpreter (`program.py`), so that no file of ours has to be visible in there.
"""
