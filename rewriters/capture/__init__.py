"""Capture: from a live module and example inputs to a plain torch.fx graph at ATen level.

The stage takes a module, a call of it and its :class:`~rewriters.capture.scope.Region`, and gives a
:class:`~rewriters.capture.export.Capture`. Start reading at ``export.py``. ``recording.py`` records how a model calls its
submodules. The other files are for models that torch.export cannot trace as they are: ``python_branches.py`` (``if`` on a
tensor), ``mixture_of_experts.py`` (sparse experts), ``packed_images.py`` and ``batch_images.py`` (all images in one sequence).
"""
