"""What a comparison is, apart from the fits: what is trained when, what is said, kept and found.

- ``runs`` is one network, trained and tested, and reads it back from plain values.
- ``jobs`` says what is to be trained and after what, and trains one after another.
- ``processes`` trains several at a time, each in a process.
- ``folder`` keeps finished runs, so that a comparison that was interrupted goes on; ``question`` says what they answer.
- ``progress`` says which network is trained and how long the rest will take; ``quiet`` has Lightning
  say no more.
- ``result`` is what was found; ``verdict`` says it in a sentence, ``figure`` draws it.

It may import what draws (reporting), the core and Lightning. It knows no fits: a job is anything that can be trained.

Another thing that can be asked of a finished comparison: a file here, and a method of ``Comparison``.
"""

from pl_dendrites.comparing.folder import Folder
from pl_dendrites.comparing.jobs import Job, Key, Tell, in_order
from pl_dendrites.comparing.processes import Workers
from pl_dendrites.comparing.progress import Progress
from pl_dendrites.comparing.question import question
from pl_dendrites.comparing.quiet import quiet
from pl_dendrites.comparing.result import Comparison
from pl_dendrites.comparing.runs import Run
from pl_dendrites.comparing.verdict import mode_of

__all__ = [
    "Comparison",
    "Folder",
    "Job",
    "Key",
    "Progress",
    "Run",
    "Tell",
    "Workers",
    "in_order",
    "mode_of",
    "question",
    "quiet",
]
