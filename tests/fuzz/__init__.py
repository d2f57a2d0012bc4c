"""Fuzzing of everything that reads files: ``python -m tests.fuzz 10000`` in the root of a checkout.

A reader gets a small valid input, mutations of it, and must load it or refuse it by an error of madtp. Start at ``reading.py``,
which says what a reader is, and ``judging.py``, which says what became of an attempt. The mutations are plain records, drawn
from the tables in ``changes.py``: by hypothesis in ``test_fuzz.py``, by a seed in the command (``command.py``, ``runner.py``).
"""
