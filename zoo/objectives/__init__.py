"""What the models of the zoo learn: the losses of each task, and how a pruned model follows the dense one.

An objective takes a model and gives batches, the arguments of the model, losses and metrics; ``zoo/recipes`` trains by it.
Start with :class:`zoo.objectives.base.Objective`.

- ``base.py``: :class:`Objective` and :class:`PairObjective`, the interface that recipes use.
- ``paper.py``: objectives on data sets in files, as the paper trains; ``momentum_contrast.py`` has the loss of retrieval.
- ``scenes.py``: chooses the objective on scenes for a model. ``scene_base.py`` has what they share, ``scene_statements.py``,
  ``scene_decoders.py`` and ``scene_pairs.py`` have one kind each, ``scene_batches.py`` draws pictures with annotations.
- ``auxiliary_heads.py``: heads that read annotations off tokens during training and are discarded afterwards.
- ``multi_text.py``: wraps models so that vision runs once for several texts about a picture.
"""
