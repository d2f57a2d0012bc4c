"""Lower: price a graph with its sites inserted, and let it call the host's own modules again.

Takes an :class:`~rewriters.insert.workspace.Insertion`. ``pricing.py`` gives the cost table of its graph, before
``lift.py`` turns calls of known leaf modules into ``call_module`` nodes.
"""
