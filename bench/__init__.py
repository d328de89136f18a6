"""Benchmarks: every op against its peers and the machine's limits; `mmfast bench` runs them.

The folder is installed as `mmfast.bench`. Its files import each other by relative names, so that type
checkers and pytest can follow them in a checkout, too.
"""
