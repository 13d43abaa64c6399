"""What hangs on a layer: its dendrites, how they get there, and what stands still while others learn.

``dendrites`` has all dendrites of one layer, a list of what ``block`` has, a run of like ones and their cascade, of
what ``shared_block`` has, units around a whole module, and of what ``placed_block`` has, units of a layer that does not
learn. ``watch`` is what looks at a layer's inputs and errors: ``error_watch`` takes samples for shared ones,
``direction_watch`` finds the directions that placed ones see.
``hooks`` hangs them on a layer and takes them off; ``freeze`` keeps a network as it is while candidates learn;
``used_layers`` tells which layers training uses; ``sharded`` is what processes that share out parameters need.

It may import torch, the rule, fields, the kinds of layers and the leaves of ``core``; it does not know which layers of
a model are to grow, and no state_dict.

Another form of dendrites is a file here.
"""
