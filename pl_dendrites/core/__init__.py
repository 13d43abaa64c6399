"""The core: dendrites for any PyTorch model, without Lightning."""

from pl_dendrites.core.candidates import Candidates
from pl_dendrites.core.dendrites import Dendrites
from pl_dendrites.core.functional import ACTIVATIONS
from pl_dendrites.core.hosts import grow_on_load
from pl_dendrites.core.network import DendriticNetwork, attach, detach, restore_structure
from pl_dendrites.core.phases import Decision, PhaseMachine
from pl_dendrites.core.stack import Form
from pl_dendrites.core.targets import Selection, select_targets

__all__ = [
    "ACTIVATIONS",
    "Candidates",
    "Decision",
    "Dendrites",
    "DendriticNetwork",
    "Form",
    "PhaseMachine",
    "Selection",
    "attach",
    "detach",
    "grow_on_load",
    "restore_structure",
    "select_targets",
]
