"""What people see: while a fit runs, and afterwards.

``records`` says of a phase, as plain values, what all else here is made of. ``display`` shows a fit that runs: through
``loggers`` in TensorBoard and others, each by the ``logger_ways`` of its make, and on the progress bar. ``tables`` are
the summary, ``figures`` the pictures, ``sizes`` the one of the score over the parameters, and ``report`` says what
``page`` writes as HTML or Markdown. ``console`` says what happens in log lines, and with ``verdicts`` whether it
helped. ``notebook`` is what users look at there, the summary among it, as HTML.
``left_alone`` tells which layers get no dendrites, and with ``frozen_layers`` which frozen ones do at what cost.

It may import the core, what is saved and the Trainer's side; nothing here decides anything.

A make of logger goes into ``logger_ways``, known by the methods that it has; a picture into ``figures``; a section of
the report into ``report``.
"""
