"""Fusing: a layer and its dendrites as one computation of PyTorch's own modules and functions.

``computation`` puts one together: a graph of ``torch.fx``, which needs nothing of this package to run or load.
``private`` makes one of a Linear or convolution and its private dendrites, ``copies`` of a module whose dendrites are
copies of it, ``recurrent`` of a layer whose copies have states of their own, ``around`` of a module and the shared
dendrites around it. ``cascade`` is what the first three share, ``fetch`` knows how nodes that see a few inputs are
computed, and ``norms`` which batch normalisations are folded in.

It may import torch, the leaves, ``fields``, ``kinds`` and ``growth``. What is fused of a whole model ``core.fuse``
knows.

Another kind of layer is fused by a function beside these, and an entry in ``core.fuse``.
"""
