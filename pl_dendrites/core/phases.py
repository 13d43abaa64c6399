"""When to grow, when to stop: scores in, decisions with reasons out. No torch, no Trainer."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

__all__ = ["Decision", "PhaseMachine"]

# So much of all that the training loss fell in a base phase came after its best score. A share of a fall, and not of
# the loss itself, for what a loss is counted from means nothing: a constant may be in it, and it may be below zero.
_OVERFIT = 1 / 3
# And so much of what a base phase gained counts as going on, where more sets are to come.
_GAIN = 0.01

_Change = Literal["correlate", "prune", "integrate", "grow"]


@dataclass(frozen=True)
class Decision:
    """What the machine wants done.

    Attributes:
        kind: ``"continue"``; ``"correlate"``: go back to the best network and start a correlation phase; ``"prune"``:
            let candidates keep their strongest inputs alone, and go on with the correlation phase;
            ``"integrate"``: make the best candidates permanent and start a base phase; ``"grow"``: go back to the
            best network, add a set that learns with it and start a base phase; ``"stop"``: end training with the best
            network.
        reason: why, in words.
        is_best: the score just given is the best so far: keep this network.
    """

    kind: _Change | Literal["continue", "stop"]
    reason: str
    is_best: bool = False


@dataclass
class _State:
    phase: Literal["base", "correlation"] = "base"
    cycle: int = 0
    dendrites: int = 0  # per neuron, with the set on trial
    on_trial: bool = False  # the last set has not yet shown that it helps
    failures: int = 0  # sets in a row that did not help
    best: float | None = None  # of the network that is kept
    phase_best: float | None = None  # of the present base phase
    reference: float | None = None  # the last score of the present base phase that counted as improvement
    epochs: int = 0  # of the present phase
    scores: list[float | None] = field(default_factory=list)  # all of the present base phase; None: not finite
    waited: int = 0  # validations (base) or epochs (correlation) without improvement
    loss: float | None = None  # on training data, in the last epoch of the present base phase
    loss_at_best: float | None = None  # in the epoch of its best score
    loss_at_start: float | None = None  # in its first epoch
    loss_rise: float = 0.0  # the largest from one epoch to the next since then: what falls less may be chance
    best_is_new: bool = False  # that epoch has not yet ended
    pruned: bool = False  # in this correlation phase candidates see their strongest inputs alone
    dense_epochs: int = 0  # of this correlation phase, before they did
    tries_set: bool = False  # the present base phase began with a new set
    pending: _Change | None = None
    pending_reason: str = ""
    stop_reason: str = ""


class PhaseMachine:
    """Decides when phases end, whether a set of dendrites helped, and when training is over.

    Give it every score with :meth:`step` and every finished epoch with :meth:`end_epoch`. When one of them answers
    ``"correlate"``, ``"prune"``, ``"integrate"`` or ``"grow"``, carry that out and then call :meth:`commit`;
    until then further calls change no phase. A set is accepted as soon as a score beats the best one before it by
    ``min_delta``; a set that ends its base phase without is rejected, and the best network, which does not have it,
    comes back.

    Args:
        mode: ``"min"`` or ``"max"``.
        score_name: what messages call the score.
        max_dendrites: most dendrites per neuron.
        patience: a base phase ends after so many scores without improvement over its own best.
        min_delta: smallest change that counts as improvement. ``None``: for a set any; for the patience of a base phase
            a hundredth of what it gained since its first score, or any in the last.
        min_delta_mode: ``"abs"``, or ``"rel"``: as a share of the score to beat.
        base_epochs: length of a base phase in epochs, instead of ``patience``; one without any score waits for it.
        correlation_patience: a correlation phase ends after so many epochs in which correlations did not rise.
        max_correlation_epochs: and after so many at the latest.
        max_tries: new sets tried after one that did not help.
        correlation: whether there are correlation phases; if not, each base phase follows the one before.
        stop_on_overfit: whether training ends, rather than that dendrites are tried, where the network overfits: more
            than a third of all that the training loss fell in a base phase came after its best score.
        growth_epochs: where growth is early, in short base phases and a last one that is long: epochs of the short
            ones. Those before the last of ``max_dendrites`` sets are short. A set is then no more than a part of the
            network to come, and stays whether or not the score improved.
        sparse: whether candidates keep a part of their inputs: a correlation phase then has two stages, each of which
            ends when correlations no longer rise, the first after half of ``max_correlation_epochs`` at the latest.
        dendrites: dendrites per neuron that the network has already.

    Attributes:
        trains: whether there is anything to train in the present base phase. One without ends with its first score.

    Example:
        >>> machine = PhaseMachine("max", patience=1, max_dendrites=1)
        >>> machine.step(0.5)
        Decision(kind='continue', reason='improved to 0.5', is_best=True)
        >>> machine.step(0.4).kind
        'correlate'
        >>> machine.commit()
        >>> machine.phase, machine.end_epoch(rose=True).kind
        ('correlation', 'continue')
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        *,
        score_name: str = "score",
        max_dendrites: int = 5,
        patience: int = 5,
        min_delta: float | None = None,
        min_delta_mode: Literal["abs", "rel"] = "abs",
        base_epochs: int | None = None,
        correlation_patience: int = 2,
        max_correlation_epochs: int = 40,
        max_tries: int = 1,
        correlation: bool = True,
        sparse: bool = False,
        stop_on_overfit: bool = False,
        growth_epochs: int | None = None,
        dendrites: int = 0,
    ) -> None:
        self._score_name = score_name
        self._sign = 1.0 if mode == "max" else -1.0
        self._max_dendrites = max_dendrites
        self._patience = patience
        self._min_delta, self._relative = min_delta, min_delta_mode == "rel"
        self._base_epochs = base_epochs
        self._correlation_patience = correlation_patience
        self._max_correlation_epochs = max_correlation_epochs
        self._max_tries = max_tries
        self._sparse = sparse
        self._stop_on_overfit = stop_on_overfit
        self._growth_epochs = growth_epochs
        self._after_base: Literal["correlate", "grow"] = "correlate" if correlation else "grow"
        self._state, self.trains = _State(dendrites=dendrites), True

    @property
    def phase(self) -> Literal["base", "correlation"]:
        """The phase that is running."""
        return self._state.phase

    @property
    def cycle(self) -> int:
        """0 in the first base phase; each set of dendrites that is tried starts the next."""
        return self._state.cycle

    @property
    def dendrites(self) -> int:
        """Dendrites per neuron, the set on trial included."""
        return self._state.dendrites

    @property
    def on_trial(self) -> bool:
        """Whether the newest set has yet to show that it helps."""
        return self._state.on_trial

    @property
    def accepted(self) -> bool | None:
        """Whether the set that the present base phase began with showed that it helps; ``None`` where there is none."""
        return not self._state.on_trial if self._state.tries_set else None

    @property
    def dense_epochs(self) -> int:
        """Finished epochs of the present correlation phase in which candidates saw all their inputs."""
        return self._state.dense_epochs if self._state.pruned else self._state.epochs

    @property
    def growing(self) -> bool:
        """Whether growth is early and more sets are to come: the present base phase is a short one."""
        return self._growth_epochs is not None and self._state.dendrites < self._max_dendrites

    @property
    def goes_back(self) -> bool:
        """Whether a correlation phase begins with the best network; where every set stays, with the present one."""
        return self._growth_epochs is None

    @property
    def base_epochs(self) -> int | None:
        """Length of the present base phase in epochs; ``None``: what scores say."""
        return self._growth_epochs if self.growing else self._base_epochs

    @property
    def best(self) -> float | None:
        """Score of the network to keep; ``None`` before the first finite one."""
        return self._state.best

    @property
    def phase_best(self) -> float | None:
        """Best score of the present base phase."""
        return self._state.phase_best

    @property
    def epochs(self) -> int:
        """Finished epochs of the present phase."""
        return self._state.epochs

    @property
    def scores(self) -> list[float | None]:
        """Every score of the present base phase in order; ``None`` for one that was not finite."""
        return list(self._state.scores)

    @property
    def pending(self) -> Decision | None:
        """The decision that waits to be carried out."""
        kind = self._state.pending
        return None if kind is None else Decision(kind, self._state.pending_reason)

    @property
    def stop_reason(self) -> str:
        """Why training is over; empty while it is not."""
        return self._state.stop_reason

    def step(self, score: float, settled: bool = True) -> Decision:
        """Take a score of the network; one that is not finite counts as no improvement.

        Args:
            score: the monitored value.
            settled: whether scores like this one will decide; until then no base phase ends.

        Returns:
            The decision. In a correlation phase always ``"continue"``, for the network does not change.

        Raises:
            ValueError: if the first base phase is over and no score was ever finite.
        """
        state = self._state
        finite = math.isfinite(score)
        if state.phase == "correlation":
            if state.best is None and finite:  # what stands still is the best network, whose score was forgotten
                state.best = score
            return Decision("continue", "the network stands still")
        state.scores.append(float(score) if finite else None)
        rejected = (
            state.pending is not None and state.on_trial and self.goes_back
        )  # that set goes: it must not win any more
        is_best = finite and not rejected and self._beats_best(score)
        if is_best:
            state.best, state.on_trial = score, False
        if finite and (state.phase_best is None or self._gain(score, state.phase_best) > 0):
            state.phase_best, state.best_is_new = score, True
        if finite and (state.reference is None or self._goes_on(score, state.reference)):
            state.reference, state.waited = score, 0
        else:
            state.waited += 1
        goes_on = self.base_epochs is not None or state.waited < self._patience
        waits = not settled or (self.trains and goes_on)
        if state.stop_reason or state.pending or waits:
            reason = f"improved to {score:.6g}" if state.waited == 0 else f"no improvement for {state.waited}"
            return Decision("continue", reason, is_best)
        why = f"no improvement in {state.waited} validations"
        return self._end_base(why if self.trains else "nothing is trained before it grows", is_best)

    def end_epoch(self, rose: bool = False, loss: float | None = None, settled: bool = True) -> Decision:
        """Count a finished epoch.

        Args:
            rose: in a correlation phase, whether any correlation rose.
            loss: in a base phase, the mean loss on training data, if it is known.
            settled: see :meth:`step`.

        Returns:
            The decision.

        Raises:
            ValueError: as :meth:`step` does.
        """
        state = self._state
        state.epochs += 1
        if state.phase == "base":
            self._take_loss(loss)
            if state.best_is_new:
                state.loss_at_best, state.best_is_new, state.loss_rise = loss, False, 0.0
        if state.stop_reason or state.pending:
            return Decision("continue", "a decision is waiting" if state.pending else state.stop_reason)
        if state.phase == "base":
            over = self.base_epochs is not None and state.epochs >= self.base_epochs
            if over and state.scores and settled:  # without any it could only be taken for one that did not help
                return self._end_base(f"{state.epochs} epochs are over", False)
            return Decision("continue", "the base phase waits for a score" if over else "the base phase goes on")
        state.waited = 0 if rose else state.waited + 1
        dense = self._sparse and not state.pruned
        end: Literal["prune", "integrate"] = "prune" if dense else "integrate"
        if state.waited >= self._correlation_patience:
            return self._switch(end, f"nothing more was found in {state.waited} epoch{'s' * (state.waited > 1)}")
        if state.epochs >= ((self._max_correlation_epochs + 1) // 2 if dense else self._max_correlation_epochs):
            return self._switch(end, f"{state.epochs} correlation epochs are over")
        return Decision("continue", "correlations rise" if rose else f"nothing more was found for {state.waited}")

    def commit(self) -> None:
        """The pending decision has been carried out: its phase begins.

        Raises:
            RuntimeError: if none is pending.
        """
        state = self._state
        if state.pending is None:
            raise RuntimeError("no decision is pending")
        self.trains, state.pruned = True, state.pending == "prune"
        if state.pruned:
            state.dense_epochs = state.epochs
            state.waited, state.pending, state.pending_reason = 0, None, ""
            return
        if state.pending != "integrate":
            if self.goes_back:
                state.dendrites -= state.on_trial  # a rejected set went with the network that is no longer the best
            state.on_trial = state.tries_set = False
            state.phase, state.cycle = "correlation", state.cycle + 1
        if state.pending != "correlate":
            state.phase, state.on_trial, state.tries_set = "base", True, True
            state.dendrites += 1
            self._forget_phase()
        state.epochs = state.waited = state.dense_epochs = 0
        state.scores = []
        state.pending, state.pending_reason = None, ""

    def stop(self, reason: str) -> Decision:
        """End the machine from outside; the pending decision lapses.

        Args:
            reason: why.
        """
        self._state.pending, self._state.stop_reason = None, self._state.stop_reason or reason
        return Decision("stop", self._state.stop_reason)

    def forget_scores(self) -> None:
        """The scores so far were of another kind than those to come: none of them is to be beaten."""
        state = self._state
        state.best = state.phase_best = state.reference = state.loss_at_best = None
        state.best_is_new, state.scores = False, []
        if state.phase == "base":
            state.waited = 0

    def wind_up(self) -> None:
        """Training ended and the best network came back: a later fit goes on from it in a base phase."""
        state = self._state
        state.dendrites -= state.on_trial
        state.phase, state.on_trial, state.pruned, state.tries_set = "base", False, False, False
        self._forget_phase()
        state.epochs = state.waited = state.dense_epochs = 0
        state.scores = []
        state.pending, state.pending_reason = None, ""

    def state_dict(self) -> dict[str, Any]:
        """The whole state as plain values."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; settings stay those of this machine.

        Args:
            state: from :meth:`state_dict`.

        Raises:
            ValueError: if it has unknown entries or impossible values. The machine is then left as it was.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of the phase machine must be a dict, got {type(state).__name__}")
        unknown = set(state) - {field.name for field in fields(_State)}
        if unknown:
            names = sorted(key if isinstance(key, str) else type(key).__name__ for key in unknown)
            raise ValueError(f"unknown entries in the state of the phase machine: {names}")
        loaded = _State(**state)
        wrong = _impossible(loaded)
        if wrong:
            raise ValueError(f"impossible values in the state of the phase machine: {', '.join(wrong)}")
        loaded.scores = list(loaded.scores)
        if "tries_set" not in state:  # an older state: every base phase but the first was taken for one with a set
            loaded.tries_set = loaded.phase == "base" and loaded.cycle > 0
        self._state = loaded

    def _forget_phase(self) -> None:
        state = self._state
        state.phase_best = state.reference = state.loss = state.loss_at_best = state.loss_at_start = None
        state.best_is_new, state.loss_rise = False, 0.0

    def _take_loss(self, loss: float | None) -> None:
        state = self._state
        if state.epochs == 1:
            state.loss_at_start = loss
        if loss is not None and state.loss is not None:
            state.loss_rise = max(state.loss_rise, loss - state.loss)
        state.loss = loss

    def _gain(self, score: float, other: float) -> float:
        return self._sign * (score - other)

    def _improves(self, score: float, other: float) -> bool:
        least = self._min_delta or 0.0
        return self._gain(score, other) > least * (abs(other) if self._relative else 1.0)

    def _goes_on(self, score: float, other: float) -> bool:
        if self._min_delta is not None or self._state.dendrites >= self._max_dendrites:
            return self._improves(score, other)
        first = next((value for value in self._state.scores if value is not None), other)
        return self._gain(score, other) > _GAIN * max(self._gain(other, first), 0.0)

    def _beats_best(self, score: float) -> bool:
        best = self._state.best
        if best is None:
            return True
        # A set on trial must earn its place; after that every gain is kept.
        earns = self._state.on_trial and self.goes_back
        return self._improves(score, best) if earns else self._gain(score, best) > 0

    def _end_base(self, why: str, is_best: bool) -> Decision:
        state = self._state
        if state.best is None:
            raise ValueError(f"the first base phase is over and {self._score_name!r} was never finite")
        if self._growth_epochs is not None:
            over = f"{why}; growth is over"
            return self._switch(self._after_base, why, is_best) if self.growing else self._halt(over, is_best)
        overfit = self._overfit()
        if overfit:
            why = f"{why}; {overfit}"
            if self._stop_on_overfit:
                return self._halt(why, is_best)
        if state.on_trial:
            state.failures += 1
            if state.failures > self._max_tries:
                which = "the set" if state.failures == 1 else f"{state.failures} sets in a row"
                return self._halt(f"{why}; {which} did not help", is_best)
            return self._switch(
                self._after_base, f"{why}; the set did not help and is discarded, a new one is tried", is_best
            )
        state.failures = 0
        if state.dendrites >= self._max_dendrites:
            return self._halt(f"{why}; max_dendrites={self._max_dendrites} is reached", is_best)
        return self._switch(self._after_base, why, is_best)

    def _overfit(self) -> str:
        start, before, after = self._state.loss_at_start, self._state.loss_at_best, self._state.loss
        if start is None or before is None or after is None:
            return ""
        if before - after <= max(_OVERFIT * (max(start, before) - after), self._state.loss_rise):
            return ""
        return f"it overfits (training loss {before:.4g} to {after:.4g} since the best score)"

    def _switch(self, kind: _Change, reason: str, is_best: bool = False) -> Decision:
        self._state.pending, self._state.pending_reason = kind, reason
        return Decision(kind, reason, is_best)

    def _halt(self, reason: str, is_best: bool) -> Decision:
        self._state.stop_reason = reason
        return Decision("stop", reason, is_best)


def _impossible(state: _State) -> list[str]:
    checks = {
        **{name: isinstance(getattr(state, name), bool) for name in ("on_trial", "pruned", "best_is_new", "tries_set")},
        **{
            name: _is_count(getattr(state, name))
            for name in ("cycle", "dendrites", "failures", "epochs", "waited", "dense_epochs")
        },
        **{
            name: _is_score(getattr(state, name))
            for name in ("best", "phase_best", "reference", "loss", "loss_at_best", "loss_at_start")
        },
        "loss_rise": state.loss_rise is not None and _is_score(state.loss_rise) and state.loss_rise >= 0,
        **{name: isinstance(getattr(state, name), str) for name in ("phase", "pending_reason", "stop_reason")},
        "pending": isinstance(state.pending, str | None),
        "scores": isinstance(state.scores, list) and all(_is_score(score) for score in state.scores),
    }
    if all(checks.values()):  # types; now what they say together
        changes = ("correlate", "grow") if state.phase == "base" else ("prune", "integrate")
        checks = {
            "phase": state.phase == "base" or (state.phase == "correlation" and state.cycle > 0),
            "pending": state.pending in (None, *changes),
            "pruned": not state.pruned or state.phase == "correlation",
            "on_trial": not state.on_trial or (state.phase == "base" and state.dendrites > 0),
            "tries_set": not state.tries_set or (state.phase == "base" and state.cycle > 0),
            "dense_epochs": state.dense_epochs <= (state.epochs if state.pruned else 0),
        }
    return [name for name, possible in checks.items() if not possible]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_score(value: object) -> bool:
    # Only finite scores are ever taken; an integer beyond the floats is none.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)  # type: ignore[arg-type]
