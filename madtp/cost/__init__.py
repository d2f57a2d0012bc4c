"""Cost: multiply-accumulates of a program.

``table.py`` prices a captured program in closed form, from the token counts at its sites (``counts.py``);
``counting.py`` counts while eager code runs, for what no captured graph prices. Start at
:class:`~madtp.cost.table.CostTable`.
"""
