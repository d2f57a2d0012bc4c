"""The method: alignment guidance (MAG) and dynamic token pruning (DTP) as functions of tensors.

Takes a layer's residual stream, its attention statistics and the alignment tokens; gives the tokens that survive and the
token that the others are merged into. Nothing here knows a model or a graph.

Read in the order of the computation: ``guidance.py`` (G, C, L_align), ``importance.py`` (s1, s2, s3, S), ``threshold.py``
(theta), ``selection.py`` (who survives), ``merging.py`` (the merged token). ``docs/method.md`` has all equations in one
place, ``docs/deviations.md`` every point in which the defaults differ from the authors' code.
"""
