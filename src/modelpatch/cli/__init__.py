"""The command line: one thin function per verb, the same names and defaults as the Python functions."""
