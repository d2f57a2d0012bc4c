"""Plan: where tokens will be pruned, as pure data.

The stage takes the structure that was detected, the configuration and the example inputs, and gives a frozen
:class:`~rewriters.plan.plan.Plan` of sites and refusals. Start reading at ``plan.py`` (the data), then at ``make_plan.py``
(the decisions). ``policy.py`` says what is protected and what is left alone, ``inheritance.py`` what joined streams ask of
their parts, and ``causality.py`` whether a mask is causal.
"""
