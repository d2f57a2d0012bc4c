"""Lower: price a graph with its sites inserted, pack its batches, and let it call the host's own modules again.

Takes an :class:`~rewriters.insert.workspace.Insertion`. ``pricing.py`` gives the cost table of its graph, in the padded form.
``packing.py`` then lets pruned streams run as packed rows, by the rules of ``packed_rules.py``, and ``lift.py`` turns calls of
known leaf modules into ``call_module`` nodes.
"""
