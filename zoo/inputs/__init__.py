"""Example inputs for models of libraries, made from their configurations. Start with :func:`zoo.example_inputs`.

``families.py`` registers an adapter for each library and each family with arguments of its own. ``arguments.py`` makes the
common arguments one by one; ``draft.py`` has the batch in the making, ``patches.py`` images that are given as patches.
"""
