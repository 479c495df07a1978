"""The built-in trainer: executes any `Strategy` the planner makes for it.  `python -m qipan.trainer` is one rank.

Importing this package costs nothing; torch comes in with the modules below it.
"""
