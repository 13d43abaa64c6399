"""The core: dendrites for any PyTorch model, without Lightning.

``attach`` gives dendrites to a model and takes them away, ``network`` is what one then works with. ``targets`` says
which layers can have them, ``structure`` reads off a state_dict which ones a model must have, ``loaders`` has any model
grow that something loads, ``pretrained`` those that load from files by themselves, ``candidate_state`` looks at what a
state says of candidates, ``claims`` at what either says of sizes, ``mirrors`` finds what grows with what it copies,
``phases`` decides when to grow, and ``cost`` what growth costs. Below are three rooms, each with a page of its own:
``growth`` (what hangs on a layer), ``rule`` (what candidates learn) and ``kinds`` (a kind of layer each). ``tensors``,
``activations``, ``keys`` and ``checks`` are leaves, which all may use.

It imports torch and the standard library alone (``pretrained`` safetensors too, where there is such a file), and
nothing from the rest of the package. Imports run one way: the files of this folder, then ``growth``, then ``rule``,
then ``kinds``, then the leaves.
"""

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.attach import attach, detach, restore_structure
from pl_dendrites.core.growth.block import Form
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.loaders import growing
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import Decision, PhaseMachine
from pl_dendrites.core.rule.candidates import Candidates
from pl_dendrites.core.structure import grow_on_load
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
    "growing",
    "restore_structure",
    "select_targets",
]
