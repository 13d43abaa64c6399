"""Files of a fused network, for machines that have not this package.

``fused`` makes such a file, asks it what it answers, and says what came out: its size, its speed, how far it is from
the model. A format has a file each: ``pickled`` is PyTorch's own, ``pt2`` that of ``torch.export``, ``onnx`` and
``executorch`` those of others, with eight bits; ``form`` says what a format must have, and what several share.

It may import the core. What a format needs to be installed is imported where it is used.

A format goes into a file of its own, and into the table in ``fused``.
"""
