"""Verify: what is checked on every rewrite.

The stage takes a program with the module it replaces, as a :class:`~rewriters.verify.checks.Case`, and raises
:class:`~madtp.errors.RewriteError` where they disagree. Start reading at ``checks.py``, a table of checks. ``replay.py``
carries one pruning decision out in different ways, ``rounding.py`` tells rounding from a fault, and ``payoff.py`` compares
what pruning costs with what it can save.
"""
