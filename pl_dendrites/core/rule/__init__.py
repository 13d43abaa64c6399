"""The correlation rule: what candidates learn, and what they are worth.

``correlation`` has the rule itself, as the function of autograd that it is, and Pearson's coefficient; ``transforms``
the rule where ``torch.func`` is at work. ``moments`` are
the statistics that both are made of, ``common_scale`` makes a sample count the same in every batch, and ``inputs`` says
how much inputs vary. ``candidates`` is a layer's pool, ``processes`` pools that learn with several processes, ``worth``
which neurons a dendrite pays on.

It may import torch, ``core.tensors``, ``core.activations`` and the kinds of layers; it knows neither dendrites that are
part of a network nor the network.

Another rule (another objective, another choice among a pool) is a file here beside ``correlation``.
"""
