"""Regions: which submodules of a model are rewritten, and how their programs become one pruned model.

Takes a model with an example call, gives a :class:`~madtp.pruned.PrunedModel`. Start at
:func:`rewriters.regions.rewrite.rewrite_model`: ``choice.py`` picks the regions, by a walk down the module tree (``walk.py``);
``chains.py`` has those that are several blocks, ``rewriters/pipeline.py`` rewrites each of them, ``assembly.py`` puts the
programs into the model, ``reporting.py`` says what was found.
"""
