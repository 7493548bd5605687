"""Runs code that a model wrote, where it can do no harm and cannot decide its own verdict.

`limits` what a program may use; `levels` the ways of this machine to confine it; `process` starts and ends one confined
program; `probe` tries what holds; `inside/` the programs that run within. Only `inside/` is held to the standard library.
"""
