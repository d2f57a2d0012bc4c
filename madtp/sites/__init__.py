"""Pruning sites: the modules that a rewritten graph calls once per block to score, keep and merge tokens.

Takes the residual stream behind a block's self-attention, and statistics of that attention; gives the surviving
tokens and their state. Start at :class:`~madtp.sites.site.PruningSite`. ``scoring.py`` and ``window_attention.py`` observe the
attention, ``control.py`` holds what all sites of a model share (strength, configuration, record of the last forward), and
``additions.py`` gathers everything that pruning adds to a model, under the prefix ``madtp``.
"""
