"""Checkpoint files of other projects, read strictly into models of the zoo. Start with :mod:`zoo.checkpoints.loading`.

``files.py`` and ``torchscript.py`` read files without executing anything in them, ``key_table.py`` maps their keys to those of
a model, and ``official.py`` makes pruned models of the MADTP authors' files.
"""
