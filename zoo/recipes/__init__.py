"""Recipes of training: what ``madtp train`` and ``madtp compress`` run, and the config files of all published models.

A config file names one of the modules that have ``build`` and ``finish``, see :mod:`madtp.training.run`. Start with
``compress_scenes.py``, which is short:

- ``scenes_dense.py``: trains a mini model on scenes from scratch (``nlvr_scenes.py`` is its former form for statements).
- ``compress_scenes.py``: compresses a mini model on scenes. ``compress_data.py``: compresses a model on a data set in files, in
  the paper's settings; ``data_loader.py`` opens its samples.
- ``compression.py`` and ``compression_settings.py``: what both compressions share.
- ``controls.py``: what compressed minis are compared with; ``token_merging.py`` has one of these.
- ``catalogue.py`` finds config files by name, and lists them.
- ``model_card.py`` tests trained weights and writes their card; ``warm_start.py`` takes start weights from another model.
"""
