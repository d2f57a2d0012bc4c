"""Insert: put the sites of a plan into a captured graph and repair everything downstream of them.

Takes a canonical graph and a :class:`~rewriters.plan.plan.Plan`, changes the graph in place and gives an
:class:`~rewriters.insert.workspace.Insertion`: the graph with the labels of its nodes and its token states. Start at
``insert.py``; ``kv_cache.py`` does the same for a call that continues a pruned one from its key/value cache.
"""
