"""The core: dendrites for any PyTorch model, without Lightning.

- ``attach`` gives dendrites to a model and takes them away; ``network`` is what one then works with.
- ``shared`` is both for shared dendrites, ``unit_set`` says what some to come are like, ``moves`` moves their fields;
  ``soma`` is a network that has nothing else.
- ``placed`` is what one works with where dendrites of a frozen network are placed by its error, and ``watching`` what
  this and ``shared`` have in common.
- ``targets`` says which layers can have them.
- ``mirrors`` finds what grows with what it copies, and ``mirrored`` has it do so.
- ``structure`` reads off a state_dict which dendrites a model must have; ``shared_structure`` does so of shared ones,
  ``placed_structure`` of placed ones.
- ``loaders`` has any model grow that something loads, ``pretrained`` those that load from files by themselves.
- ``fuse`` makes a plain model of a grown one, for use elsewhere.
- ``adapter`` takes dendrites alone out of a model, and puts them onto another.
- ``candidate_state`` looks at what a state says of candidates, and ``claims`` at what any says of sizes.
- ``phases`` decides when to grow, ``cost`` knows what growth costs, and ``inventory`` what each layer has.

Below are five rooms, each with a page of its own: ``growth`` (what hangs on a layer), ``fusing`` (a layer and its
dendrites in plain PyTorch), ``rule`` (what candidates learn), ``fields`` (what shared dendrites see) and ``kinds`` (a
kind of layer each). ``tensors``, ``activations``, ``keys``, ``checks`` and ``markup`` (tables, printed and in
notebooks) are leaves, which all may use.

It imports torch and the standard library alone (``pretrained`` safetensors too, where there is such a file), and
nothing from the rest of the package. Imports run one way: the files of this folder, then ``fusing``, then ``growth``,
then ``rule`` and ``fields``, then ``kinds``, then the leaves.
"""

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.adapter import dendrites_state_dict, load_dendrites
from pl_dendrites.core.attach import attach, detach, restore_structure
from pl_dendrites.core.fuse import fuse
from pl_dendrites.core.growth.block import Form
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.loaders import growing
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import Decision, PhaseMachine
from pl_dendrites.core.rule.candidates import Candidates
from pl_dendrites.core.shared import SharedNetwork, attach_shared
from pl_dendrites.core.soma import Soma
from pl_dendrites.core.structure import grow_on_load
from pl_dendrites.core.targets import Selection, select_targets
from pl_dendrites.core.unit_set import UnitSet

__all__ = [
    "ACTIVATIONS",
    "Candidates",
    "Decision",
    "Dendrites",
    "DendriticNetwork",
    "Form",
    "PhaseMachine",
    "Selection",
    "SharedNetwork",
    "Soma",
    "UnitSet",
    "attach",
    "attach_shared",
    "dendrites_state_dict",
    "detach",
    "fuse",
    "grow_on_load",
    "growing",
    "load_dendrites",
    "restore_structure",
    "select_targets",
]
