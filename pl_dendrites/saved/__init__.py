"""What is saved, and how it comes back.

- ``fit_state`` is the callback's part of a checkpoint and refuses what cannot be one.
- ``best`` is the best network so far, ``frontier`` the best of each size before it; ``place`` is where each of them is,
  and ``copies`` makes copies of weights where there must be some, of what is ``frozen`` in a file.
- ``partial`` completes what models save that save a part of themselves.
- ``interrupted`` is what an exception found.
- ``loading`` reads checkpoints and makes grown models of them; ``folder`` reads those that are folders, and
  ``folder_index`` says what is where in one.
- ``reading`` is where tensors and plain values come out of a file, and nothing else.

It may import the core and Lightning, and knows neither the Trainer's side nor what is shown. How a state_dict tells the
structure of a model is in the core, which has to restore it without anything else: ``core.structure``, ``core.keys``.

To save something more of a fit: a field of ``FitState``, with its check; to read another kind of file: a file here,
which reads by way of ``reading``.
"""
