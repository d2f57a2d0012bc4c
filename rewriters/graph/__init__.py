"""What all stages share about graphs, models aside.

``nodes.py`` asks one node (its name, shape, arguments), ``walk.py`` goes along edges, ``op_sets.py`` names sets of operations
that have a property in common, and ``match.py`` keeps why a pattern did not fit. ``emit.py`` makes nodes that carry shapes;
``dependencies.py`` and ``residual.py`` answer what a value is computed from; ``functional.py`` turns writes into values.
"""
