"""When training grows, goes back and stops: a table of scores and what they lead to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_dendrites.core import Decision, PhaseMachine

NAN, INF = math.nan, math.inf
BASE: dict[str, Any] = {"patience": 2, "max_dendrites": 2, "correlation_patience": 1}


def grow(machine: PhaseMachine) -> None:
    """Carry out "correlate" and the correlation phase, in which nothing rises."""
    machine.commit()
    assert machine.phase == "correlation"
    while machine.end_epoch(rose=False).kind != "integrate":
        pass
    machine.commit()
    assert machine.phase == "base"


def play(machine: PhaseMachine, scores: Sequence[float]) -> str:
    """One word per score, an epoch each: ``-`` go on, ``grow`` or ``stop``, with a ``+`` where it is the best."""
    words = []
    for score in scores:
        decision = machine.step(score)
        best = "+" if decision.is_best else ""
        kind = decision.kind if decision.kind != "continue" else machine.end_epoch().kind
        grown = {"correlate": "grow", "grow": "grow"}
        words.append(best + {"continue": "" if best else "-", "stop": "stop", **grown}[kind])
        if kind == "correlate":
            grow(machine)
        if kind == "grow":
            machine.commit()
    return " ".join(words)


SCENARIOS = [
    pytest.param({}, [1, 2, 3, 3, 3], "+ + + - grow", 1, id="plateau"),
    pytest.param({}, [5, 4, 3, 2, 1, 0], "+ - grow - - grow", 1, id="falling"),
    pytest.param({}, [1, 1, 1], "+ - grow", 1, id="ties-are-no-improvement"),
    pytest.param({}, [1, 1, 2, 2, 2], "+ - + - grow", 1, id="patience-starts-anew"),
    pytest.param({}, [1, 1, 1, 2, 2, 2], "+ - grow + - grow", 2, id="accepted"),
    pytest.param({}, [1, 1, 1, 0, 0.5, 2, 2, 2], "+ - grow - - + - grow", 2, id="accepted-late"),
    pytest.param({}, [1, 1, 1, 0, 0, 0, 2, 2, 2], "+ - grow - - grow + - grow", 2, id="accepted-at-second-try"),
    pytest.param({}, [1, 1, 1, 1, 1, 1, 1, 1, 1], "+ - grow - - grow - - stop", 1, id="two-sets-did-not-help"),
    pytest.param({}, [1, 1, 1, 2, 2, 2, 3, 3, 3], "+ - grow + - grow + - stop", 2, id="max-dendrites"),
    pytest.param(
        {},
        [1, 1, 1, 0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 0, 0],
        "+ - grow - - grow + - grow - - grow - - stop",
        2,
        id="a-set-that-helped-restores-the-tries",
    ),
    pytest.param({}, [1, 1, 1, 2, 2, 3, 3, 3], "+ - grow + - + - grow", 2, id="gains-after-acceptance-are-kept"),
    pytest.param({"max_tries": 0}, [1, 1, 1, 1, 1, 1], "+ - grow - - stop", 1, id="no-try"),
    pytest.param({"max_tries": 2}, [1] * 12, "+ - grow - - grow - - grow - - stop", 1, id="two-tries"),
    pytest.param({"max_dendrites": 0}, [1, 2, 2, 2], "+ + - stop", 0, id="no-dendrite"),
    pytest.param({"dendrites": 1}, [1, 1, 1, 2, 2, 2], "+ - grow + - stop", 2, id="begun-with-one"),
    pytest.param({"patience": 1}, [1, 2, 2], "+ + grow", 1, id="patience-one"),
    pytest.param({}, [0, 0, 0, 1, 0, 0], "+ - grow + - grow", 2, id="zero"),
    pytest.param({}, [-3, -2, -2, -2, -1, -1, -1], "+ + - grow + - grow", 2, id="negative"),
    pytest.param({}, [1, NAN, 2, NAN, NAN], "+ - + - grow", 1, id="nan"),
    pytest.param({}, [NAN, 1, NAN, NAN], "- + - grow", 1, id="nan-first"),
    pytest.param({}, [1, INF, -INF], "+ - grow", 1, id="infinities-are-no-improvement"),
    pytest.param({}, [1, 1, 1, NAN, NAN, NAN, 2], "+ - grow - grow - +", 1, id="nan-in-a-set-on-trial"),
    pytest.param({"min_delta": 0.5}, [1, 1.5, 1.6, 1.9], "+ + + +", 0, id="abs-gains-add-up-to-one"),
    pytest.param({"min_delta": 0.5}, [1, 1.25, 1.5, 1.5], "+ + +grow -", 1, id="abs-gain-must-exceed"),
    pytest.param({"min_delta": 0.5}, [1, 1, 1, 1.4, 1.4, 1.4], "+ - grow - - grow", 1, id="abs-too-little-for-a-set"),
    pytest.param({"min_delta": 0.5}, [1, 1, 1, 1.6, 1.7, 1.7], "+ - grow + + grow", 2, id="abs-enough-for-a-set"),
    pytest.param({"min_delta": 0.1}, [1, 1.04, 1.08, 1.12], "+ + +grow -", 1, id="abs-creeping"),
    pytest.param(
        {"min_delta": 0.1, "patience": 3}, [1, 1.04, 1.08, 1.12, 1.16], "+ + + + +", 0, id="abs-creeping-fast"
    ),
    pytest.param({"min_delta": 0.1, "min_delta_mode": "rel"}, [10, 10.5, 11, 11], "+ + +grow -", 1, id="rel"),
    pytest.param({"min_delta": 0.1, "min_delta_mode": "rel"}, [10, 11.5, 12, 12.7], "+ + + +", 0, id="rel-enough"),
    pytest.param({"min_delta": 0.1, "min_delta_mode": "rel"}, [-10, -9.5, -8.9, -8.9], "+ + + -", 0, id="rel-negative"),
    pytest.param({"min_delta": 0.1, "min_delta_mode": "rel"}, [0, 1e-9, 1e-8, 1e-8], "+ + + -", 0, id="rel-zero"),
    pytest.param({}, [0, 1, 1.005, 1.009], "+ + + +grow", 1, id="less-than-a-hundredth-of-the-gain"),
    pytest.param({}, [900, 901, 901.005, 901.009], "+ + + +grow", 1, id="whatever-scores-are-counted-from"),
    pytest.param({}, [0, 1, 1.02, 1.04], "+ + + +", 0, id="more-than-a-hundredth-of-the-gain"),
    pytest.param({}, [0, 1, 1, 1, 1.001, 1.001, 1.001], "+ + - grow + - grow", 2, id="any-gain-keeps-a-set"),
    pytest.param({"max_dendrites": 0}, [0, 1, 1.005, 1.009, 1.012], "+ + + + +", 0, id="any-gain-goes-on-in-the-last"),
    pytest.param({"base_epochs": 2}, [1, 2, 3, 4, 5, 6], "+ +grow + +grow + +stop", 2, id="fixed-length"),
    pytest.param(
        {"base_epochs": 3}, [1, 1, 1, 1, 1, 1, 1, 1, 1], "+ - grow - - grow - - stop", 1, id="fixed-length-no-gain"
    ),
    pytest.param(
        {"base_epochs": 4, "patience": 1}, [1, 0, 0, 2, 0], "+ - - +grow -", 1, id="fixed-length-has-no-patience"
    ),
]


@pytest.mark.parametrize("correlation", [True, False])
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(("options", "scores", "words", "dendrites"), SCENARIOS)
def test_scores_lead_to_these_decisions(
    options: dict[str, Any], scores: list[float], words: str, dendrites: int, mode: Any, correlation: bool
) -> None:
    """With correlation phases or without."""
    machine = PhaseMachine(mode, correlation=correlation, **{**BASE, **options})
    signed = [score if mode == "max" else -score for score in scores]
    assert play(machine, signed) == words
    assert machine.dendrites == dendrites
    bests = [score for score, word in zip(signed, words.split(), strict=True) if "+" in word]
    assert machine.best == (bests[-1] if bests else None)
    assert machine.cycle == words.count("grow")
    assert bool(machine.stop_reason) == ("stop" in words)


@pytest.mark.parametrize(
    ("rises", "options", "epochs"),
    [
        pytest.param("", {"correlation_patience": 3}, 3, id="never"),
        pytest.param("1", {"correlation_patience": 3}, 4, id="once"),
        pytest.param("001001", {"correlation_patience": 3}, 9, id="in-time"),
        pytest.param("0001", {"correlation_patience": 3}, 3, id="too-late"),
        pytest.param("1" * 99, {"correlation_patience": 3, "max_correlation_epochs": 7}, 7, id="always"),
        pytest.param("1", {"correlation_patience": 9, "max_correlation_epochs": 1}, 1, id="one-epoch"),
        pytest.param("11", {"correlation_patience": 1}, 3, id="patience-one"),
    ],
)
def test_a_correlation_phase_ends_when_nothing_rises_or_it_is_long_enough(
    rises: str, options: dict[str, int], epochs: int
) -> None:
    machine = PhaseMachine("max", patience=1, **options)
    machine.step(1.0)
    assert machine.step(1.0).kind == "correlate"
    machine.commit()
    for epoch in range(1, epochs + 1):
        score = machine.step(99.0)
        assert (score.kind, score.is_best) == ("continue", False)
        decision = machine.end_epoch(rose=epoch <= len(rises) and rises[epoch - 1] == "1")
        assert decision.kind == ("integrate" if epoch == epochs else "continue")
    assert machine.best == 1.0


@pytest.mark.parametrize("options", [{"patience": 3}, {"base_epochs": 3}], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_first_phase_without_a_finite_score_is_an_error(bad: float, options: dict[str, int]) -> None:
    machine = PhaseMachine("max", **options)
    with pytest.raises(ValueError, match="never finite"):
        play(machine, [bad] * 3)
    machine = PhaseMachine("max", **options)
    play(machine, [bad, 1.0])


def test_a_loss_that_creeps_down_for_ever_is_a_plateau() -> None:
    losses = [1 + 0.999**epoch for epoch in range(400)]
    for options in ({"min_delta": 0.01}, {"min_delta": 0.01, "min_delta_mode": "rel"}):
        assert "grow" in play(PhaseMachine("min", patience=5, **options), losses)
    assert "grow" not in play(PhaseMachine("min", patience=5), losses)


def test_a_set_that_gained_less_than_asked_is_not_the_best_network() -> None:
    machine = PhaseMachine("max", patience=3, min_delta=0.5)
    assert play(machine, [1, 1, 1, 1]) == "+ - - grow"
    assert play(machine, [1.3, 1.3]) == "- -"
    assert (machine.best, machine.phase_best, machine.on_trial) == (1, 1.3, True)
    assert play(machine, [1.6]) == "+"
    assert (machine.best, machine.on_trial) == (1.6, False)


def decide(machine: PhaseMachine) -> None:
    machine.step(1.0)
    assert machine.step(1.0).kind == "correlate"


def test_a_decision_waits_until_it_is_carried_out() -> None:
    machine = PhaseMachine("max", patience=1, correlation_patience=1, max_dendrites=3)
    with pytest.raises(RuntimeError, match="no decision is pending"):
        machine.commit()
    decide(machine)
    reason = machine.pending.reason
    assert machine.pending == Decision("correlate", reason)
    assert machine.phase == "base"
    for _ in range(3):
        assert machine.step(0.5).kind == machine.end_epoch().kind == "continue"
    assert machine.pending == Decision("correlate", reason)
    machine.commit()
    assert (machine.pending, machine.phase, machine.epochs) == (None, "correlation", 0)
    assert machine.end_epoch().kind == "integrate"
    assert machine.end_epoch(rose=True).kind == "continue"
    assert machine.phase == "correlation"
    machine.commit()
    assert (machine.phase, machine.dendrites, machine.on_trial) == ("base", 1, True)
    assert (machine.best, machine.phase_best) == (1.0, None)
    with pytest.raises(RuntimeError, match="no decision is pending"):
        machine.commit()


def test_a_set_that_is_being_discarded_cannot_win_any_more() -> None:
    machine = PhaseMachine("max", patience=1, correlation_patience=1, max_dendrites=1)
    decide(machine)
    grow(machine)
    machine.step(0.5)
    assert machine.step(0.5).kind == "correlate"
    assert not machine.step(2.0).is_best
    machine.commit()
    assert (machine.best, machine.dendrites) == (1.0, 0)


def test_a_score_between_the_decision_and_its_phase_can_still_be_the_best() -> None:
    machine = PhaseMachine("max", patience=1)
    decide(machine)
    assert machine.step(2.0) == Decision("continue", "improved to 2", is_best=True)
    assert machine.pending.kind == "correlate"


@pytest.mark.parametrize("phase", ["base", "pending", "correlation"])
def test_stopping_from_outside_is_final_and_keeps_the_first_reason(phase: str) -> None:
    machine = PhaseMachine("max", patience=1)
    if phase != "base":
        decide(machine)
    if phase == "correlation":
        machine.commit()
    assert machine.stop("enough") == Decision("stop", "enough")
    assert machine.stop("later").reason == machine.stop_reason == "enough"
    assert machine.pending is None
    assert machine.step(-1.0).kind == machine.end_epoch().kind == "continue"
    assert machine.pending is None


def test_a_fit_that_ended_within_a_trial_leaves_the_best_network_to_the_next() -> None:
    machine = PhaseMachine("max", patience=1, correlation_patience=1)
    decide(machine)
    grow(machine)
    machine.step(0.5)
    machine.wind_up()
    assert (machine.phase, machine.dendrites, machine.on_trial, machine.epochs) == ("base", 0, False, 0)
    assert (machine.best, machine.phase_best, machine.pending) == (1.0, None, None)
    decide(machine)
    machine.commit()
    machine.wind_up()
    assert (machine.phase, machine.dendrites, machine.best) == ("base", 0, 1.0)
    assert machine.step(2.0).is_best


def test_reasons_name_what_decided() -> None:
    reasons = []
    for options in ({}, {"base_epochs": 2}, {"max_dendrites": 0}, {"max_tries": 0}):
        machine = PhaseMachine("max", **{**BASE, **options})
        play(machine, [1] * 12)
        reasons.append(machine.stop_reason)
    assert reasons == [
        "no improvement in 2 validations; 2 sets in a row did not help",
        "2 epochs are over; 2 sets in a row did not help",
        "no improvement in 2 validations; max_dendrites=0 is reached",
        "no improvement in 2 validations; the set did not help",
    ]
    machine = PhaseMachine("max", patience=1, correlation_patience=2, max_correlation_epochs=2)
    decide(machine)
    machine.commit()
    assert machine.end_epoch(rose=True).reason == "correlations rise"
    assert machine.end_epoch(rose=True).reason == "2 correlation epochs are over"


def test_an_unknown_entry_of_a_state_is_refused_and_a_missing_one_is_not() -> None:
    machine = PhaseMachine("max", patience=1)
    decide(machine)
    state = machine.state_dict()
    with pytest.raises(ValueError, match=r"\['temperature'\]"):
        machine.load_state_dict({**state, "temperature": 1})
    assert machine.state_dict() == state
    machine.load_state_dict({key: value for key, value in state.items() if key != "pending_reason"})
    assert machine.pending.kind == "correlate"


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"phase": "dream"}, "phase"),
        ({"phase": None}, "phase"),
        ({"phase": "correlation"}, "phase"),  # there is none before the first cycle
        ({"cycle": 1.0}, "cycle"),
        ({"cycle": 10**300}, "cycle"),
        ({"dendrites": -1}, "dendrites"),
        ({"failures": True}, "failures"),
        ({"epochs": "7"}, "epochs"),
        ({"waited": None}, "waited"),
        ({"best": math.nan}, "best"),
        ({"phase_best": INF}, "phase_best"),
        ({"reference": 10**400}, "reference"),
        ({"best": True}, "best"),
        ({"on_trial": 1}, "on_trial"),
        ({"on_trial": True}, "on_trial"),  # a set of no dendrites
        ({"on_trial": True, "dendrites": 1, "phase": "correlation", "cycle": 1, "pending": None}, "on_trial"),
        ({"pending": "integrate"}, "pending"),  # in a base phase
        ({"pending": ["correlate"]}, "pending"),
        ({"pending_reason": None}, "pending_reason"),
        ({"scores": None}, "scores"),
        ({"scores": [0.5, math.nan]}, "scores"),
        ({"stop_reason": 3}, "stop_reason"),
    ],
)
def test_an_impossible_value_of_a_state_is_refused(entries: dict[str, Any], name: str) -> None:
    machine = PhaseMachine("max", patience=1)
    decide(machine)
    state = machine.state_dict()
    with pytest.raises(ValueError, match=rf"impossible values in the state of the phase machine: {name}\b"):
        machine.load_state_dict({**state, **entries})
    assert machine.state_dict() == state


@pytest.mark.parametrize("state", [None, 3, "state", [("phase", "base")]])
def test_a_state_that_is_no_dict_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=f"must be a dict, got {type(state).__name__}"):
        PhaseMachine().load_state_dict(state)


OPTIONS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "max_dendrites": st.integers(0, 3),
        "patience": st.integers(1, 3),
        "min_delta": st.sampled_from([None, 0.0, 0.5]),
        "min_delta_mode": st.sampled_from(["abs", "rel"]),
        "base_epochs": st.none() | st.integers(1, 3),
        "correlation_patience": st.integers(1, 2),
        "max_correlation_epochs": st.integers(1, 4),
        "max_tries": st.integers(0, 2),
    }
)
SCORES = (
    st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0])
    | st.floats(-3, 3, allow_nan=False)
    | st.integers(-2, 2).map(float)
)
EPOCHS = st.lists(st.tuples(SCORES, st.booleans(), st.booleans()), max_size=60)


def saved_and_restored(machine: PhaseMachine, options: dict[str, Any]) -> PhaseMachine:
    fresh = PhaseMachine(**options)
    fresh.load_state_dict(json.loads(json.dumps(machine.state_dict())))
    assert fresh.state_dict() == machine.state_dict()
    return fresh


@settings(max_examples=150, deadline=None)
@given(OPTIONS, EPOCHS)
def test_whatever_the_scores(options: dict[str, Any], epochs: list[tuple[float, bool, bool]]) -> None:
    machine, resumed = PhaseMachine(**options), PhaseMachine(**options)
    seen: list[float] = []
    better = min if options["mode"] == "min" else max

    def both(call: str, *args: Any) -> Decision | None:
        nonlocal resumed
        resumed = saved_and_restored(resumed, options)
        decision = getattr(machine, call)(*args)
        assert getattr(resumed, call)(*args) == decision
        assert resumed.state_dict() == machine.state_dict()
        assert machine.dendrites <= options["max_dendrites"]
        return decision

    constant = [(0.25, True, True)] * 300
    for score, rose, at_once in epochs + constant:
        if machine.stop_reason:
            break
        if machine.phase == "base" and math.isfinite(score) and not (machine.pending and machine.on_trial):
            seen.append(score)
        try:
            decisions = [both("step", score), both("end_epoch", rose)]
        except ValueError:
            assert not seen
            return
        if seen and not options["min_delta"]:
            assert machine.best == better(seen)
        assert machine.best is None or machine.best in seen
        assert sum(d.kind != "continue" for d in decisions) <= 1
        if machine.pending and at_once:
            both("commit")
    assert machine.stop_reason


def test_scores_of_the_present_base_phase_are_kept_in_order() -> None:
    machine = PhaseMachine("max", patience=2, max_correlation_epochs=1)
    for score in (0.5, math.nan, 0.25):
        machine.step(score)
    assert machine.scores == [0.5, None, 0.25]
    machine.commit()
    assert machine.scores == []
    machine.step(0.5)  # of a network that stands still
    machine.end_epoch()
    assert machine.scores == []
    machine.commit()
    machine.step(INF)
    state = machine.state_dict()
    machine.wind_up()
    assert machine.scores == []
    machine.load_state_dict(state)
    machine.step(0.75)
    assert machine.scores == [None, 0.75]
    assert state["scores"] == [None]


@pytest.mark.parametrize(("loss", "overfits"), [(2.9, False), (1.9, True)])
@pytest.mark.parametrize("stop", [False, True])
def test_a_training_loss_that_falls_where_scores_do_not_rise_is_said_and_can_end_training(
    loss: float, overfits: bool, stop: bool
) -> None:
    machine = PhaseMachine("max", patience=2, max_dendrites=1, stop_on_overfit=stop)
    for score, of_epoch in ((0.5, 5.0), (0.6, 3.0), (0.6, loss)):
        assert machine.step(score).kind == machine.end_epoch(loss=of_epoch).kind == "continue"
    decision = machine.step(0.6)
    assert decision.kind == ("stop" if stop and overfits else "correlate")
    said = "it overfits (training loss 3 to 1.9 since the best score)"
    assert (said in decision.reason) == overfits


def test_the_loss_of_another_phase_or_none_at_all_says_nothing_of_overfitting() -> None:
    machine = PhaseMachine("max", patience=1, correlation_patience=1, max_dendrites=2, stop_on_overfit=True)
    machine.step(0.5)
    machine.end_epoch(loss=4.0)
    machine.step(0.4)
    machine.end_epoch(loss=None)
    grow(machine)
    machine.step(0.6)
    machine.end_epoch(loss=1.0)
    assert machine.step(0.6).kind == "correlate"


def test_candidates_that_are_to_be_sparse_have_a_stage_before_and_one_after() -> None:
    machine = PhaseMachine("max", patience=1, correlation_patience=2, max_correlation_epochs=5, sparse=True)
    decide(machine)
    machine.commit()
    stages = [machine.end_epoch(rose=True).kind for _ in range(3)]
    assert stages == ["continue", "continue", "prune"], "the first stage has half of the epochs, rounded up"
    assert machine.end_epoch(rose=True).kind == "continue", "until it is carried out it waits"
    machine.commit()
    assert (machine.phase, machine.cycle, machine.epochs, machine.dendrites) == ("correlation", 1, 4, 0)
    assert machine.end_epoch(rose=True).kind == "integrate", "all epochs are over"
    machine.commit()
    decide(machine)
    machine.commit()
    for stage in ("prune", "integrate"):
        assert [machine.end_epoch(rose=False).kind for _ in range(2)] == ["continue", stage]
        machine.commit()
    assert (machine.phase, machine.dendrites) == ("base", 1)


# -- scores of another kind, and none -----------------------------------------------------------------------------


def test_a_base_phase_of_fixed_length_waits_for_its_first_score() -> None:
    machine = PhaseMachine("max", base_epochs=2, max_correlation_epochs=1)
    assert [machine.end_epoch().kind for _ in range(3)] == ["continue"] * 3
    machine.step(math.nan)
    with pytest.raises(ValueError, match="never finite"):
        machine.end_epoch()
    machine.step(1.0)
    assert machine.end_epoch().kind == "correlate"


@pytest.mark.parametrize("options", [{"patience": 5}, {"base_epochs": 5}, {"growth_epochs": 5}])
@pytest.mark.parametrize("correlation", [True, False])
def test_a_base_phase_with_nothing_to_train_ends_with_its_first_score(
    options: dict[str, int], correlation: bool
) -> None:
    machine = PhaseMachine("max", correlation=correlation, **options)
    machine.trains = False
    assert machine.step(0.3, settled=False).kind == "continue"
    kind = "correlate" if correlation else "grow"
    assert machine.step(0.5) == Decision(kind, "nothing is trained before it grows", is_best=True)
    machine.commit()
    assert machine.trains
    machine = PhaseMachine("max", max_dendrites=0, **options)
    machine.trains = False
    assert machine.step(0.5).kind == "stop"
    machine = PhaseMachine(**options)
    machine.trains = False
    with pytest.raises(ValueError, match="never finite"):
        machine.step(NAN)


@pytest.mark.parametrize("options", [{"patience": 1}, {"base_epochs": 1}], ids=str)
def test_no_base_phase_ends_by_scores_that_may_not_decide(options: dict[str, int]) -> None:
    machine = PhaseMachine("max", **options)
    for _ in range(4):
        kinds = [machine.step(1.0, settled=False).kind, machine.end_epoch(settled=False).kind]
        assert kinds == ["continue", "continue"]
    machine.step(1.0)
    assert (machine.pending or machine.end_epoch()).kind == "correlate"


def test_forgotten_scores_are_not_to_be_beaten() -> None:
    machine = PhaseMachine("max", patience=2)
    machine.step(9.0)
    machine.end_epoch(loss=3.0)
    machine.forget_scores()
    assert (machine.best, machine.phase_best, machine.scores) == (None, None, [])
    assert machine.step(1.0).is_best
    decide(machine)
    machine.commit()
    machine.forget_scores()
    machine.step(NAN)
    machine.step(2.0)  # of the network that stands still, which is the best one
    assert machine.best == 2.0


# -- which base phases try a set ----------------------------------------------------------------------------------


def test_a_fit_that_goes_on_after_a_correlation_phase_tries_no_set() -> None:
    machine = PhaseMachine("max", patience=1, correlation_patience=1, max_correlation_epochs=1)
    decide(machine)
    assert machine.accepted is None
    machine.commit()
    machine.wind_up()
    assert (machine.phase, machine.cycle, machine.accepted) == ("base", 1, None)
    decide(machine)
    grow(machine)
    assert machine.accepted is False
    machine.step(2.0)
    assert machine.accepted is True
    machine.wind_up()
    assert machine.accepted is None


def test_an_older_state_does_not_tell_whether_a_set_was_tried() -> None:
    machine = PhaseMachine("max", patience=1, correlation_patience=1)
    decide(machine)
    grow(machine)
    machine.step(2.0)
    new = {"tries_set", "dense_epochs", "loss_at_start", "loss_rise"}
    older = {key: value for key, value in machine.state_dict().items() if key not in new}
    again = PhaseMachine("max", patience=1, correlation_patience=1)
    again.load_state_dict(older)
    assert again.accepted is True


# -- overfitting --------------------------------------------------------------------------------------------------

LOSSES = {
    "from the start": ([3.0, 2.0, 1.0, 0.5, 0.2], 1, True),
    "in the end": ([3.0, 1.0, 0.5, 0.2, 0.19, 0.18], 3, False),
    "it does not fall": ([3.0, 1.0, 1.0, 1.0], 1, False),
    "it rises": ([1.0, 2.0, 3.0], 0, False),
    "chance": ([2.301, 2.303, 2.300, 2.302, 2.3005], 0, False),
    "a spike before": ([3.0, 9.0, 2.0, 1.0, 0.5], 2, True),
}


@pytest.mark.parametrize(("scale", "constant"), [(1.0, 0.0), (1.0, 50.0), (1.0, -7.0), (1e-3, 0.0), (200.0, -1e3)])
@pytest.mark.parametrize(("losses", "best", "overfits"), LOSSES.values(), ids=LOSSES.keys())
def test_what_a_loss_is_counted_from_and_in_says_nothing_of_overfitting(
    losses: list[float], best: int, overfits: bool, scale: float, constant: float
) -> None:
    machine = PhaseMachine("max", base_epochs=len(losses))
    for epoch, loss in enumerate(losses):
        machine.step(1.0 if epoch == best else 0.0)
        decision = machine.end_epoch(loss=scale * loss + constant)
    assert decision.kind == "correlate"
    assert ("overfits" in decision.reason) == overfits


# -- early growth -------------------------------------------------------------------------------------------------

EARLY: dict[str, Any] = {"growth_epochs": 2, "max_correlation_epochs": 1, "patience": 2, "max_dendrites": 2}


def early(scores: Sequence[float], **given: Any) -> tuple[PhaseMachine, str]:
    """One word per epoch: what it led to, a ``+`` where its score is the best; and the machine."""
    machine, words = PhaseMachine("max", **{**EARLY, **given}), []
    for score in scores:
        first = machine.step(score)
        decision = first if first.kind != "continue" else machine.end_epoch()
        words.append(("+" if first.is_best else "-") + {"continue": ""}.get(decision.kind, decision.kind))
        if decision.kind == "correlate":
            grow(machine)
        elif decision.kind == "stop":
            break
    return machine, " ".join(words)


@pytest.mark.parametrize(
    ("given", "scores", "expected", "dendrites"),
    [
        # Short phases whatever the scores, and a last one that is as long as they say.
        ({}, [1, 2, 1, 1, 3, 4, 4, 4], "+ +correlate - -correlate + + - -stop", 2),
        ({"base_epochs": 3}, [1, 2, 1, 1, 0, 0, 5], "+ +correlate - -correlate - - +stop", 2),
        ({"growth_epochs": 1, "max_dendrites": 1}, [1, 2, 2, 2], "+correlate + - -stop", 1),
    ],
)
def test_early_growth(given: dict[str, Any], scores: list[float], expected: str, dendrites: int) -> None:
    machine, words = early(scores, **given)
    assert words.replace("continue", "") == expected
    assert machine.dendrites == dendrites


def test_early_growth_goes_on_from_its_state_at_any_time() -> None:
    scores = [1, 2, 3, 3, 3, 3, 4, 4, 4]
    given: dict[str, Any] = {"max_dendrites": 3}
    whole, _ = early(scores, **given)
    for cut in range(1, 8):
        part, _ = early(scores[:cut], **given)
        again = PhaseMachine("max", **{**EARLY, **given})
        again.load_state_dict(json.loads(json.dumps(part.state_dict())))
        for score in scores[cut:]:
            kind = again.step(score).kind
            kind = again.end_epoch().kind if kind == "continue" else kind
            if kind == "correlate":
                grow(again)
        assert (again.best, again.dendrites, again.stop_reason) == (whole.best, whole.dendrites, whole.stop_reason)
