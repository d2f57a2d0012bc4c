"""Axes: which dimension of which tensor runs along which tokens, through every operation of a graph.

Takes a graph and the labels of a few values, gives the labels of all that is computed from them, the places that read
tokens, and the repairs that operations need once tokens are missing. Detection and insertion both rest on it. Start at
``labels.py`` for the data, ``table.py`` for the rules and ``propagate.py`` for a walk over a graph; ``grid.py`` follows
tokens through windows and other moves on a grid, before any is pruned.
"""
