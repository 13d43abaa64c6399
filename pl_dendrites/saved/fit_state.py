"""What a fit saves in a checkpoint, and refusing what no fit can have saved: a checkpoint may come from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from pl_dendrites.core.claims import check_claims
from pl_dendrites.core.phases import PhaseMachine

__all__ = ["FitState", "parameter_names_in"]

_FORMAT = 3
_GO_ON = (
    "Go on with those, or begin anew from its weights: `load_from_checkpoint(..., path)`, and a fit without"
    " `ckpt_path`."
)

# Takes what was found and where; raises ValueError if it cannot be.
_Check = Callable[[Any, str], None]


@dataclass(frozen=True)
class FitState:
    """Everything that a resumed fit needs, as tensors and plain values.

    Attributes:
        machine: of the :class:`~pl_dendrites.core.phases.PhaseMachine`.
        history: a record for every finished phase.
        best: of the :class:`~pl_dendrites.saved.best.BestModel`.
        seed: from which those of candidates follow.
        score: of the :class:`~pl_dendrites.training.score.Score`.
        loss: of the :class:`~pl_dendrites.training.score.TrainingLoss`.
        batches: trained so far.
        counted: batches at the end of the last epoch that was counted.
        correlation: of the correlation phase that is running, if one is.
        used: names of the layers that training was seen to use, where no correlation phase would tell.
        running: the record of the phase that is running.
        monitor: the metric that decides; older states are without.
        mode: whether a good score is small or large; older states are without.
        mirrors: name of each module that grows with another, and of that.
        form: of dendrites, where the fit found it: ``around`` and ``reason`` of a
            :class:`~pl_dendrites.training.first_calls.Form`.
        frontier: of the :class:`~pl_dendrites.saved.frontier.Frontier`; older states are without.
        rewiring: of the :class:`~pl_dendrites.training.rewiring.Rewiring`, where there are shared dendrites.

    Example:
        >>> FitState.from_dict({"format": 2})
        Traceback (most recent call last):
        ValueError: it has format 2; this version of pl_dendrites reads format 3
    """

    machine: dict[str, Any]
    history: list[dict[str, Any]]
    best: dict[str, Any]
    seed: int
    score: dict[str, Any]
    loss: dict[str, Any]
    batches: int
    counted: int
    correlation: dict[str, Any] | None
    used: list[str]
    running: dict[str, Any] | None = None
    monitor: str | None = None
    mode: str | None = None
    mirrors: dict[str, str] = field(default_factory=dict)
    rewiring: dict[str, Any] | None = None
    form: dict[str, Any] | None = None
    frontier: dict[str, Any] = field(default_factory=lambda: {"best": None, "smaller": []})

    @property
    def metric(self) -> tuple[str, str] | None:
        """The metric that decides and its mode; ``None`` where nothing tells."""
        records = [{"monitor": self.monitor, "mode": self.mode}, self.running or {}, *self.history[-1:]]
        known = [(record.get("monitor"), record.get("mode")) for record in records]
        return next(((monitor, mode) for monitor, mode in known if monitor and mode), None)

    @property
    def neurons(self) -> dict[str, int]:
        """Of layers that can grow, by their names, as far as they were known."""
        layers = (self.running or {}).get("layers", {})
        return {name: layer["neurons"] for name, layer in layers.items() if layer["neurons"]}

    def refuse_other(self, monitor: str, mode: str, mirrors: Mapping[str, str] | None) -> None:
        """Raise where a callback cannot go on with this.

        Args:
            monitor: the metric that decides there.
            mode: whether a good score is small or large there.
            mirrors: the mirrors that are named there; ``None``: those of this state.

        Raises:
            ValueError: says what differs and what to do.
        """
        saved, own = self.metric, (monitor, mode)
        if saved not in (None, own):
            of, here = (f"monitor={metric!r}, mode={side!r}" for metric, side in (saved, own))
            raise ValueError(
                f"its scores are those of {of}, and this callback has {here}: they cannot be compared. {_GO_ON}"
            )
        if mirrors is not None and dict(mirrors) != self.mirrors:
            raise ValueError(f"its mirrors are {self.mirrors}, and this callback has mirrors={dict(mirrors)}. {_GO_ON}")

    def to_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        untold = {name for name in ("monitor", "mode") if entries[name] is None}
        return {"format": _FORMAT, **{name: value for name, value in entries.items() if name not in untold}}

    @classmethod
    def from_dict(cls, state: Any) -> FitState:
        """Take up what is in a checkpoint, if :meth:`to_dict` can have put it there; types and ranges are looked at.

        Args:
            state: what is in the checkpoint.

        Raises:
            ValueError: says what is wrong and where.
        """
        _mapping(state, "it")
        if type(state.get("format")) is not int or state["format"] != _FORMAT:
            raise ValueError(
                f"it has format {_shown(state.get('format'))}; this version of pl_dendrites reads format {_FORMAT}"
            )
        _STATE(state, "it")
        if state["correlation"] is not None and state["machine"].get("phase") != "correlation":
            raise ValueError("it has candidates outside a correlation phase")
        return cls(**{name: value for name, value in state.items() if name != "format"})


def parameter_names_in(checkpoint: Mapping[str, Any], key: str) -> list[list[list[str]]]:
    """The names of the parameters of each group of each optimizer that a fit put into a checkpoint; none if none did.

    Args:
        checkpoint: the checkpoint.
        key: where they are.

    Raises:
        ValueError: if something else is there.

    Example:
        >>> parameter_names_in({"names": [["weight"]]}, "names")
        Traceback (most recent call last):
        ValueError: 0 in 0 in 'names' must be a list, got 'weight'
    """
    names: list[list[list[str]]] = checkpoint.get(key, [])
    _each(_list, _each(_list, _each(_list, _text)))(names, f"'{key}'")
    return names


def _shown(value: object) -> str:
    # The value where it is short; a tensor, or a number of thousands of digits, only by its type.
    short = isinstance(value, bool | float | str | None) or (isinstance(value, int) and abs(value) < 2**64)
    return f"{value!r:.50}" if short else type(value).__name__


def _that(allowed: str, holds: Callable[[Any], bool]) -> _Check:
    def check(value: Any, where: str) -> None:
        if not holds(value):
            raise ValueError(f"{where} must be {allowed}, got {_shown(value)}")

    return check


def _entries(optional: Mapping[str, _Check] | None = None, /, **required: _Check) -> _Check:
    checks = {**required, **(optional or {})}

    def check(value: Any, where: str) -> None:
        _mapping(value, where)
        if not set(required) <= set(value) <= set(checks):
            raise ValueError(f"{where} must have the entries {sorted(checks)}, got {sorted(value)}")
        for name in value:
            checks[name](value[name], f"'{name}' in {where}" if where != "it" else f"'{name}'")

    return check


def _each(container: _Check, inner: _Check) -> _Check:
    def check(value: Any, where: str) -> None:
        container(value, where)
        for key in value if isinstance(value, Mapping) else range(len(value)):
            inner(value[key], f"{key!r} in {where}")

    return check


def _maybe(inner: _Check) -> _Check:
    return lambda value, where: None if value is None else inner(value, where)


def _one_of(*allowed: Any) -> _Check:
    return _that(f"one of {list(allowed)}", lambda value: any(type(value) is type(a) and value == a for a in allowed))


def _whole(least: int) -> _Check:
    return _that(f"an integer of at least {least}", lambda value: type(value) is int and least <= value < 2**63)


def _weights(value: Any, where: str) -> None:
    _mapping(value, where)
    for name, entry in value.items():
        # What a module keeps in `get_extra_state` is its own affair.
        if name.rpartition(".")[2] != "_extra_state":
            _tensor(entry, f"'{name}' in {where}")


def _held(inner: _Check, tied: bool = False) -> _Check:
    # Each tensor may be put into memory by itself, and in another type; tied ones stay tied.
    def check(value: Any, where: str) -> None:
        inner(value, where)
        check_claims(value, where, "the state", tied=tied)

    return check


_text = _that("a text", lambda value: isinstance(value, str))
_tensor = _that("a tensor", lambda value: isinstance(value, Tensor))
_optimizer = _that(
    "the state of an optimizer",
    lambda v: (
        isinstance(v, Mapping)
        and isinstance(v.get("state"), Mapping)
        and isinstance(v.get("param_groups"), list)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in v["param_groups"])
    ),
)
_list = _that("a list", lambda value: isinstance(value, list))
_mapping = _that("a dict with texts as keys", lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v))
_number = _that("a number", lambda value: isinstance(value, float) or (type(value) is int and abs(value) < 2**63))

_LAYER = _entries(
    {"next": _whole(0)},  # older records are without
    type=_text,
    neurons=_maybe(_whole(0)),
    dendrites=_whole(0),
    parameters=_whole(0),
)
_RECORD = _entries(
    {  # for reports; older records are without
        **dict.fromkeys(("candidates", "units", "multiplications"), _whole(0)),
        "layers": _each(_mapping, _LAYER),
        "skipped": _each(_mapping, _text),
        "monitor": _text,
        "mode": _one_of("min", "max"),
        "learning": _one_of("correlation", "gradient", "hybrid"),
        "form": _one_of("shared", "private"),
        "form_reason": _text,
        "inference_cost": _number,
        "step_cost": _number,
    },
    **dict.fromkeys(("cycle", "dendrites", "parameters", "epochs"), _whole(0)),
    phase=_one_of("base", "correlation"),
    score=_maybe(_number),
    scores=_each(_list, _maybe(_number)),
    best_score=_maybe(_number),
    accepted=_one_of(True, False, None),
    correlation=_each(_mapping, _entries(mean=_number, max=_number)),
    reason=_text,
)
_CORRELATION = _entries(
    {  # older states are without
        **dict.fromkeys(("whole_epoch", "own_gradients"), _one_of(True, False)),
        "waiting": _whole(0),
        "single": _held(_each(_list, _tensor)),
        **dict.fromkeys(("gradients", "summed"), _held(_each(_list, _maybe(_tensor)))),
    },
    candidates=_held(_each(_mapping, _each(_mapping, _tensor))),
    optimizer=_held(_optimizer),
    trainable=_each(_list, _text),
)
_REWIRING = _entries(
    batches=_whole(0),
    looks_since=_whole(-1),
    deviation=_held(_each(_mapping, _tensor)),
    gains=_held(_each(_list, _tensor)),
)
_SIZE: dict[str, _Check] = dict.fromkeys(("parameters", "cycle", "dendrites"), _whole(0)) | {"score": _number}
_SMALLER = _entries({"units": _whole(0), "file": _text}, **_SIZE, weights=_maybe(_weights), path=_text)


def _smaller(value: Any, where: str) -> None:
    _SMALLER(value, where)
    named = "file" in value
    if named == (value["weights"] is not None) or (value["path"] and not named):
        raise ValueError(f"{where} must have its weights or name its file")


_FRONTIER = _entries(
    best=_maybe(_entries({"units": _whole(0)}, **_SIZE)),
    smaller=_held(_each(_list, _smaller), tied=True),
)
_STATE = _entries(
    {
        "running": _maybe(_RECORD),
        "monitor": _text,
        "mode": _one_of("min", "max"),
        "mirrors": _each(_mapping, _text),
        "rewiring": _maybe(_REWIRING),
        "form": _maybe(_entries(around=_maybe(_each(_list, _text)), reason=_text)),
        "frontier": _FRONTIER,
    },
    format=_whole(0),
    machine=lambda value, where: PhaseMachine().load_state_dict(value),
    history=_each(_list, _RECORD),
    best=_entries({"file": _text}, weights=_maybe(_held(_weights, tied=True)), path=_text),
    seed=_whole(0),
    score=_entries(source=_one_of("validation", "training", None), batches=_whole(-1)),
    loss=_entries(sum=_number, count=_whole(0)),
    batches=_whole(0),
    counted=_whole(-1),
    correlation=_maybe(_CORRELATION),
    used=_each(_list, _text),
)
