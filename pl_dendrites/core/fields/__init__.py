"""Fields: which inputs a shared dendrite sees, where it starts, and how its field moves while it learns.

``sample`` holds inputs and errors of a bounded number of samples, all that growth looks at. ``draw`` draws fields from
it, ``choose`` picks of many candidates those that take most from the error together, and ``rewire`` replaces the
weakest inputs of a field by those with the largest gradient. ``product`` computes what units with fields compute.

It may import torch and the leaves, and works on tensors: it knows neither layers nor dendrites that are part of a
network.

Another way to draw a field is a function in ``draw``.
"""
