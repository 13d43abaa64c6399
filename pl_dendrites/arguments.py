"""The callback's arguments: checks whose errors say what is allowed and what was given; and who gets which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_dendrites.core.checks import check, check_at_least, check_one_of
from pl_dendrites.core.growth.block import check_form
from pl_dendrites.core.mirrors import check_mirrors
from pl_dendrites.core.targets import FROZEN
from pl_dendrites.core.unit_set import UnitSet

__all__ = ["Settings", "check_patterns", "plain"]

_BOUNDS: dict[str, float] = {
    "max_dendrites": 0,
    "candidates": 1,
    "candidate_batches": 1,
    "patience": 1,
    "min_delta": 0.0,
    "base_epochs": 1,
    "correlation_patience": 1,
    "correlation_min_delta": 0.0,
    "max_correlation_epochs": 1,
    "max_tries": 0,
    "sets": 1,
    "growth_epochs": 1,
}
_OPTIONAL = ("base_epochs", "growth_epochs", "candidates", "min_delta")

# Arguments that are the phase machine's.
_DECIDE = (
    "mode",
    "max_dendrites",
    "patience",
    "min_delta",
    "min_delta_mode",
    "base_epochs",
    "correlation_patience",
    "max_correlation_epochs",
    "max_tries",
    "stop_on_overfit",
)
# Of base phases before the last; of the last, where its length is known, a share.
_GROWTH_EPOCHS, _GROWTH_SHARE = 6, 5
# Runs are compared by these and by those that are not at their default, but not by those of a run's surroundings.
_SHOWN, _NOT_SHOWN = ("candidates", "max_dendrites"), ("dirpath", "best_on", "keep_sizes", "optimizer", "verbose")


class Settings:
    """The arguments of a :class:`~pl_dendrites.DendriteCallback`, as those want them who work with them.

    Args:
        given: all of them by name.
        defaults: of those that have one.

        reason: why the form is what :meth:`settled` says.

    Attributes:
        form: of dendrites; until it is settled, ``"private"``.
        is_open: whether the form, or where shared dendrites hang, is to be settled yet.
        is_free: whether it is, or was settled without the user.
        asks_for_shared: whether the user wants shared dendrites.
        monitor: the metric that decides.
        mode: whether a good score is small or large.
        attached: what grows, for :func:`~pl_dendrites.training.attaching.attach_to_fit`.
        mirrors: name of each module that mirrors another, and of that; ``None``: those that are found.
        next: what dendrites to come are like, for :meth:`~pl_dendrites.core.DendriticNetwork.set_next`.
        machine: of the :class:`~pl_dendrites.core.phases.PhaseMachine`.
        phase: of a :class:`~pl_dendrites.training.correlation_phase.CorrelationPhase`.
        record: what every record of the history says of the rule.
        shown: by which runs are told apart.
        by_gradient: whether there are no correlation phases.
        max_dendrites: most dendrites per neuron.
        correlation_min_delta: smallest rise of a correlation that counts, as a share of it.
        restart: whether each base phase starts with optimizers and schedulers as they were when the fit began.
        schedule_epochs: over which a schedule goes: those of a base phase, if they are known and each starts anew.
        dirpath: where to write the best network.
        best_on: whether it is in memory or on the disk alone.
        keep_sizes: whether the best network of each size is kept; ``None``: where that takes little.
        verbose: whether to say on the console what happens.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], reason: str = "") -> None:
        given = self._given = {name: plain(value) for name, value in given.items()}
        self._defaults, self._reason = defaults, reason
        _check(given)
        self._asked = _form_asked_for(given)
        self.form: Literal["shared", "private"] = "private" if given["around"] is None else "shared"
        self.is_open = self._asked != "private" and given["around"] is None
        self.is_free, self.asks_for_shared = self.is_open or bool(reason), self._asked == "shared"
        given = dict(given)
        changed = {name for name, value in given.items() if name not in defaults or value != defaults[name]}
        shared = self.form == "shared"
        places = _places(given)
        given["learning"] = given["learning"] or ("hybrid" if shared or places else "correlation")
        given["candidates"] = given["candidates"] or (8 if shared else 4)
        self.monitor: str = given["monitor"]
        self.mode: Literal["min", "max"] = given["mode"]
        self.mirrors: Mapping[str, str] | None = given["mirrors"]
        self.by_gradient, live = given["learning"] == "gradient", given["learning"] != "correlation"
        self.attached: dict[str, Any] = {name: given[name] for name in ("targets", "exclude", "around")}
        self.attached["places"] = places
        self.grows_first = places and given["growth_epochs"] is None
        self.next: dict[str, Any] = {
            "activation": given["activation"] or ("sharp_gelu" if shared else "gelu" if live else "tanh"),
            "live": live,
            "fan_in": given["fan_in"],
            "share": given["share"],
        }
        self.machine: dict[str, Any] = {name: given[name] for name in _DECIDE} | {
            "score_name": given["monitor"],
            "correlation": not self.by_gradient,
            "sparse": given["fan_in"] is not None,
        }
        if shared:
            self._share(given)
        if places:
            self._place(given)
        self.phase: dict[str, Any] = {
            "pool": given["candidates"],
            "batches": given["candidate_batches"],
            "optimizer": given["optimizer"],
            "validate": not given["skip_validation"],
        }
        self.record = {name: given[name] for name in ("monitor", "mode", "learning")}
        self.record |= {"form": self.form} | ({"form_reason": reason} if reason else {})
        self.shown = {name: given[name] for name in sorted(changed.union(_SHOWN).difference(_NOT_SHOWN))}
        self.max_dendrites: int = given["max_dendrites"]
        self.correlation_min_delta: float = given["correlation_min_delta"]
        self.schedule_epochs: int | None = given["base_epochs"] if given["restart"] else None
        self.restart, self.verbose = given["restart"], given["verbose"]
        self.dirpath, self.best_on, self.keep_sizes = given["dirpath"], given["best_on"], given["keep_sizes"]

    def settled(self, around: Sequence[str] | None, reason: str) -> Settings:
        """These settings with a form.

        Args:
            around: names of the modules that shared dendrites hang around; ``None``: dendrites are private.
            reason: why, in words.
        """
        form = "private" if around is None else "shared"
        if around is None and self.asks_for_shared:
            raise MisconfigurationException(
                f"shared dendrites, which `form='shared'` and `max_parameters` mean, have no place: {reason}. Name the"
                " modules that they are to hang around in `around`, or leave these arguments out."
            )
        return Settings(self._given | {"form": form, "around": around}, self._defaults, reason)

    @property
    def settled_form(self) -> dict[str, Any] | None:
        """What :meth:`settled` was told; ``None``: nothing."""
        return {"around": self.attached["around"], "reason": self._reason} if self._reason else None

    def _place(self, given: Mapping[str, Any]) -> None:
        # One set, for what is placed later has less time to learn, and finds less error to go by.
        self.next = {"max_parameters": given["max_parameters"]}
        self.machine |= {
            "max_dendrites": min(given["max_dendrites"], 1),
            "growth_epochs": given["growth_epochs"] or 1,
            "correlation_patience": 1,
            "max_correlation_epochs": 3,
            "sparse": False,
        }

    def _share(self, given: Mapping[str, Any]) -> None:
        # Of shared dendrites a correlation phase is the time to take samples.
        field = {} if given["fan_in"] is None else {"field": given["fan_in"]}
        wanted = UnitSet(activation=self.next["activation"], live=self.next["live"], **field)
        budget = given["max_parameters"]
        self.next = {"wanted": wanted, "max_parameters": budget, "sets": given["sets"]}
        self.machine |= {
            "max_dendrites": given["sets"] if budget and given["max_dendrites"] else given["max_dendrites"],
            "growth_epochs": None if budget is None else _growth_epochs(given),
            "max_correlation_epochs": 1,
            "sparse": False,
        }


def _growth_epochs(given: Mapping[str, Any]) -> int:
    most = given["base_epochs"]
    short = _GROWTH_EPOCHS if most is None else max(1, min(_GROWTH_EPOCHS, most // _GROWTH_SHARE))
    return given["growth_epochs"] or short


def plain(value: Any) -> Any:
    """A number, a text or a list of them as Python's own, where it is NumPy's or of a derived type; all else as it is.

    Arguments go into records and checkpoints, which hold plain values alone.

    Example:
        >>> import numpy as np
        >>> plain(np.str_("val_loss")), plain(np.float32(0.5)), plain([np.str_("Linear")]), plain(np.array([1, 2]))
        ('val_loss', 0.5, ['Linear'], [1, 2])
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return (tuple if isinstance(value, tuple) else list)(map(plain, value))
    return value


def check_patterns(name: str, value: object) -> None:
    """Raise ``ValueError`` unless a value is a list of texts, a predicate, or the word that ``targets`` may be.

    Example:
        >>> check_patterns("targets", "frozen")
        >>> check_patterns("exclude", "head.*")
        Traceback (most recent call last):
        ValueError: `exclude` must be a list of names or patterns, got 'head.*'
    """
    texts = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) and v for v in value)
    word = name == "targets" and value == FROZEN
    allowed = "a list of names or patterns" + (", or 'frozen'" if name == "targets" else "")
    check(name, texts or callable(value) or word, allowed, value)


def _check(given: Mapping[str, Any]) -> None:
    monitor, optimizer, dirpath = given["monitor"], given["optimizer"], given["dirpath"]
    check("monitor", isinstance(monitor, str) and bool(monitor), "the name of a metric", monitor)
    check_one_of("mode", given["mode"], ("min", "max"))
    check_one_of("learning", given["learning"] or "correlation", ("correlation", "gradient", "hybrid"))
    _check_around(given)
    check_one_of("min_delta_mode", given["min_delta_mode"], ("abs", "rel"))
    activation = given["activation"]
    check_form("tanh" if activation is None else activation, given["fan_in"])
    for name in ("targets", "exclude"):
        check_patterns(name, () if name == "targets" and given[name] is None else given[name])
    if given["mirrors"] is not None:
        check_mirrors(given["mirrors"])
    for name, bound in _BOUNDS.items():
        check_at_least(name, bound if name in _OPTIONAL and given[name] is None else given[name], bound)
    share = given["share"]
    number = isinstance(share, int | float) and not isinstance(share, bool)
    check("share", number and 0 < share <= 1, "a number above 0 and up to 1", share)
    by_gradient = given["learning"] == "gradient"
    check("share", share == 1 or not by_gradient, "1 with learning='gradient', which knows no worth", share)
    check("optimizer", optimizer is None or callable(optimizer), "a callable", optimizer)
    check("dirpath", dirpath is None or (isinstance(dirpath, str | Path) and dirpath != ""), "a path", dirpath)
    check_one_of("best_on", given["best_on"], ("memory", "disk"))
    there = dirpath is not None and isinstance(fsspec.core.url_to_fs(str(dirpath))[0], LocalFileSystem)
    check("dirpath", there or given["best_on"] != "disk", "a local directory with best_on='disk'", dirpath)
    check("keep_sizes", isinstance(given["keep_sizes"], bool | None), "true, false or None", given["keep_sizes"])
    for name in ("skip_validation", "stop_on_overfit", "restart", "verbose"):
        check(name, isinstance(given[name], bool), "true or false", given[name])


def _check_around(given: Mapping[str, Any]) -> None:
    form, around, most = given["form"], given["around"], given["max_parameters"]
    check_one_of("form", form or "shared", ("shared", "private"))
    number = isinstance(most, int | float) and not isinstance(most, bool)
    holds = most is None or (number and most > 1)
    check("max_parameters", holds, "a number of parameters, or how many times those of the model, above 1", most)
    if _places(given):
        _check_placed(given)
        return
    check("max_parameters", most is None or form != "private", "None with form='private', unless `targets` are", most)
    if around is not None:
        names = isinstance(around, Sequence) and not isinstance(around, str)
        names = names and all(isinstance(name, str) for name in around)
        check("around", names and len(around) > 0, "a list of names of modules", around)
        check("around", form != "private", "None with form='private'", around)
    if form == "shared" or around is not None or most is not None:
        for name in _of_private(given):
            check(name, False, "left as it is where dendrites are shared", given[name])


def _places(given: Mapping[str, Any]) -> bool:
    # A budget for the neurons' own dendrites.
    named = given["targets"] is not None and given["around"] is None
    return named and given["max_parameters"] is not None and given["form"] != "shared"


def _check_placed(given: Mapping[str, Any]) -> None:
    allowed = "with `targets` and `max_parameters`, by which dendrites are placed where the error asks for them"
    most = given["max_parameters"]
    check("max_parameters", isinstance(most, int), f"a number of parameters {allowed}", most)
    check("fan_in", given["fan_in"] is None, f"None {allowed}", given["fan_in"])
    check("share", given["share"] == 1, f"1 {allowed}", given["share"])
    check("learning", given["learning"] in (None, "hybrid"), f"'hybrid' or None {allowed}", given["learning"])
    check("activation", given["activation"] in (None, "tanh"), f"'tanh' or None {allowed}", given["activation"])


def _of_private(given: Mapping[str, Any]) -> list[str]:
    # Arguments that mean the neurons' own dendrites.
    none = {"targets": given["targets"] is None, "exclude": not callable(given["exclude"]) and not given["exclude"]}
    none |= {"share": given["share"] == 1, "learning": given["learning"] != "gradient"}
    return [name for name, unset in none.items() if not unset]


def _form_asked_for(given: Mapping[str, Any]) -> Literal["shared", "private"] | None:
    form: Literal["shared", "private"] | None = given["form"]
    if form is None and not _places(given) and (given["around"] is not None or given["max_parameters"] is not None):
        return "shared"
    return "private" if form is None and _of_private(given) else form
