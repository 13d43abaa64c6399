"""Fields: which inputs a shared dendrite sees, where it starts, and how its field moves while it learns.

``sample`` holds inputs and errors of a bounded number of samples, all that growth looks at, and ``gathered`` makes one
sample of those of several processes. ``find`` finds a set of units in it: ``draw`` draws fields, and ``choose`` picks,
of many candidates, those that take most from the error together. ``rewire`` replaces the weakest inputs of a field by
those with the largest gradient. ``product`` computes what units with fields compute.

It may import torch and the leaves, and works on tensors: it knows neither layers nor dendrites that are part of a
network.

Another way to draw a field is a function in ``draw``.
"""
