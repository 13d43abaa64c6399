"""The core: dendrites for any PyTorch model, without Lightning."""

from pl_dendrites.core.dendrites import Candidates, Dendrites
from pl_dendrites.core.functional import ACTIVATIONS
from pl_dendrites.core.network import DendriticNetwork, attach, detach, grow_on_load, restore_structure
from pl_dendrites.core.phases import Decision, PhaseMachine

__all__ = [
    "ACTIVATIONS",
    "Candidates",
    "Decision",
    "Dendrites",
    "DendriticNetwork",
    "PhaseMachine",
    "attach",
    "detach",
    "grow_on_load",
    "restore_structure",
]
