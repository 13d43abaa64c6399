"""The Trainer's side: what a fit that grows needs of a Trainer, and does to it.

``trainer`` has everything that reaches into one, and no other file does. ``stand_still`` keeps its loops going while
the network stands still, ``correlation_phase`` has candidates learn meanwhile, ``own_gradients`` helps steps that ask
for gradients of what is frozen then, and ``rewiring`` moves the fields of shared dendrites in base phases; ``score``
reads the metric that decides and the training loss; ``attaching`` makes a model ready to grow, in a form that
``first_calls`` finds, ``optimizers`` lets the user's follow a network that grows, ``groups`` says where in them a
parameter can go, ``restart`` makes them as new; ``configuring`` is about what the model configures them from,
``empty_optimizers`` lets them be over nothing, and ``untrained`` is the base phase of a network that has nothing to
train; ``processes`` is what several agree on, ``fsdp`` what sharded models need; ``refusals`` ends a fit that could not
work before it begins.

It may import the core and Lightning, and knows neither files nor what is shown.

A strategy, a callback or an optimizer that needs something of its own: here, or a reason in ``refusals``.
"""
