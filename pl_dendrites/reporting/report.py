"""What a report of growth says: what grew where and when, what it gained, what was rejected and why, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pl_dendrites.core.checks import check, check_at_least
from pl_dendrites.core.cost import base_step_cost, correlation_step_cost, inference_cost
from pl_dendrites.core.markup import Name, Table
from pl_dendrites.reporting.figures import draw_correlations, draw_growth
from pl_dendrites.reporting.page import Block, Facts, Heading, Items, Paragraph, Picture
from pl_dendrites.reporting.records import by_reason
from pl_dendrites.reporting.sizes import best_of_each_size, draw_sizes

__all__ = ["TITLE", "Controls", "Record", "report_blocks"]

TITLE = "Growth of dendrites"
_RUNNING = "still running when this was written"
_CONTROL_KEYS = {"score", "parameters", "epochs"}

_LAYER_COUNTS = {
    "neurons": "neurons",
    "dendrites": "dendrites",
    "parameters": "parameters of dendrites",
    "next": "of one more on each neuron",
}

Record = Mapping[str, Any]
Controls = Mapping[str, Mapping[str, float]]


def report_blocks(history: Sequence[Record], controls: Controls | None = None) -> list[Block]:
    """What a report consists of.

    Args:
        history: records of phases; one without a ``reason`` is still running.
        controls: see :func:`~pl_dendrites.report.write_report`.

    Raises:
        ValueError: if there are no records, or a control is not as described.
    """
    if not history:
        raise ValueError("there is nothing to report: no fit has begun")
    _check_controls(controls)
    run = _Run(history, controls or {})
    blocks: list[Block] = [Paragraph(run.headline(), stands_out=True), run.facts()]
    if run.scores:
        blocks.append(
            Picture(
                "growth",
                f"{run.metric} over the epochs of all phases. " + "".join(run.headline()),
                lambda theme: draw_growth(history, run.metric, run.mode, theme, run.control_scores),
            )
        )
    blocks += [*run.sets(), *run.sizes(), *run.control(), *run.layers(), *run.cost(), *run.left_alone(), *run.phases()]
    return blocks


def _check_controls(controls: Controls | None) -> None:
    check("controls", controls is None or isinstance(controls, Mapping), "a dict of dicts", controls)
    for name, control in (controls or {}).items():
        entries = isinstance(control, Mapping) and {"score"} <= set(control) <= _CONTROL_KEYS
        check(f"controls[{name!r}]", entries, "a dict with 'score' and, if known, 'parameters' and 'epochs'", control)
        for key, value in control.items():
            check_at_least(f"controls[{name!r}][{key!r}]", value, float("-inf") if key == "score" else 0)


class _Run:
    """A history, and what the parts of a report say of it."""

    def __init__(self, history: Sequence[Record], controls: Controls) -> None:
        self.history, self.controls = history, controls
        self.control_scores = {name: control["score"] for name, control in controls.items()}
        self.metric: str = history[0].get("monitor", "score")
        self.mode: Any = history[0].get("mode", "min")
        self.live = history[0].get("learning", "correlation") != "correlation"
        self.sign = 1.0 if self.mode == "max" else -1.0
        # A set that was rejected is no part of the network that the fit leaves.
        self.first, self.last = history[0], [history[0], *(r for r in history if r["accepted"] is not False)][-1]
        self.scores = [score for record in history for score in record["scores"] if score is not None]
        self.before, self.after = self.first["score"], history[-1]["best_score"]
        self.tried = [record for record in history if record["phase"] == "base" and record["accepted"] is not None]
        self.kept = [record for record in self.tried if record["accepted"]]
        self.added = self.last["dendrites"] - self.first["dendrites"]
        self.starts = [sum(r["epochs"] for r in history[:i]) for i in range(len(history))]

    def headline(self) -> list[str]:
        """Whether it was worth it, in one or two sentences."""
        end = f" Growth ended: {_sentence(self.history[-1]['reason'])}" if self.history[-1]["reason"] else ""
        end = end or f" The fit was {_RUNNING}."
        if self.control_scores and self.after is not None:
            name, score = max(self.control_scores.items(), key=lambda item: self.sign * item[1])
            compared = self._gain(score, self.after)
            end = f" A plain network, {name}, has {_number(score)}: the grown one is {compared}.{end}"
        if not self.tried:
            return ["No dendrites were added: no set was tried.", end]
        if not self.kept:
            return [f"No dendrites were added: {_count(len(self.tried), 'set')} tried, none of them helped.", end]
        gained = [Name(self.metric), f" went from {_number(self.before)} to {_number(self.after)}"]
        gained.append(self._gain(self.before, self.after, " (", ")"))
        return [*gained, f" with {self._dendrites(self.last)}.", end]

    @staticmethod
    def _dendrites(record: Record) -> str:
        if "units" in record:
            return _count(record["units"], "shared dendrite")
        return f"{_count(record['dendrites'], 'dendrite')} per neuron"

    def _change(self) -> tuple[str, str]:
        now, before = (str(record.get("units", record["dendrites"])) for record in (self.last, self.first))
        return now, f"before: {before}"

    def facts(self) -> Facts:
        """The figures that are looked for first."""
        epochs = {
            phase: sum(r["epochs"] for r in self.history if r["phase"] == phase) for phase in ("base", "correlation")
        }
        return Facts(
            [
                (f"best {self.metric}", _number(self.after), f"before: {_number(self.before)}"),
                ("shared dendrites" if "units" in self.last else "dendrites per neuron", *self._change()),
                ("parameters", f"{self.last['parameters']:,}", f"before: {self.first['parameters']:,}"),
                ("sets kept", f"{len(self.kept)} of {len(self.tried)}", "tried"),
                ("epochs", str(sum(epochs.values())), f"{epochs['base']} base, {epochs['correlation']} correlation"),
            ]
        )

    def sets(self) -> list[Block]:
        """A row for each set: when it came, what it gained, and whether it was kept."""
        rows = []
        for i, record in enumerate(self.history):
            if record not in self.tried:
                continue
            to_beat = next((r["best_score"] for r in reversed(self.history[:i])), None)
            verdict = "kept" if record["accepted"] else "rejected" if record["reason"] else "on trial"
            rows.append(
                [
                    str(record["cycle"]),
                    verdict,
                    self._why(record, to_beat),
                    _number(to_beat),
                    _number(record["score"]),
                    str(record["dendrites"]),
                    f"{record['parameters']:,}",
                    f"{self.starts[i]} to {self.starts[i] + record['epochs']}",
                ]
            )
        if not rows:
            return []
        columns = ("cycle", "verdict", "why", "to beat", "best", "dendrites", "parameters", "epochs")
        return [Heading("Sets of dendrites"), Table("Sets of dendrites", columns, rows, ("verdict", "why"))]

    def sizes(self) -> list[Block]:
        """The score over the parameters, where there are several sizes or plain networks of known size."""
        sizes = best_of_each_size(self.history, self.mode)
        plain = [name for name, control in self.controls.items() if "parameters" in control]
        if not sizes or not (sizes[1:] or plain):
            return []
        shows = f"{self.metric} over the parameters: the best of each size that the fit passed"
        shows += f", and {_count(len(plain), 'plain network')}." if plain else "."
        note = (
            " A line joins those that no smaller one is as good as; a ring is around the network that the fit leaves."
            " `take` of the callback puts another one into the model, if it was kept."
        )
        drawn = lambda theme: draw_sizes(self.history, self.metric, self.mode, theme, self.controls)  # noqa: E731
        rows = [
            [f"{record['parameters']:,}", _number(record["score"]), self._dendrites(record), str(record["cycle"])]
            for record in sizes
        ]
        columns = ("parameters", f"best {self.metric}", "dendrites", "cycle")
        picture = Picture("sizes", shows, drawn)
        return [Heading("Sizes"), picture, Paragraph(shows + note), Table("Sizes", columns, rows, columns[2:3])]

    def _why(self, record: Record, to_beat: float | None) -> str:
        score = record["score"]
        if record["accepted"]:
            return self._gain(to_beat, score)
        if not record["reason"]:
            return _RUNNING
        if score is None or to_beat is None:
            return "no finite score"
        if self.sign * (score - to_beat) > 0:
            return f"{self._gain(to_beat, score)}, less than min_delta asks for"
        return self._gain(to_beat, score) or "no better"

    def _gain(self, before: float | None, after: float | None, start: str = "", end: str = "") -> str:
        if before is None or after is None:
            return ""
        change = self.sign * (after - before)
        share = f" by {abs(change / before):.1%}" if before else f" by {abs(change):.4g}"
        word = "better" if change > 0 else "worse" if change < 0 else "the same"
        return f"{start}{word}{share if change else ''}{end}"

    def control(self) -> list[Block]:
        """Plain networks beside the grown one."""
        heading = Heading("Against plain networks")
        if not self.controls:
            return [
                heading,
                Paragraph(
                    "No control was given. Whether the dendrites are worth their parameters, only a plain network of"
                    " as many parameters, trained as long, can tell: train one and pass its score as a control."
                ),
            ]
        epochs = str(sum(record["epochs"] for record in self.history))
        rows: list[list[Any]] = [["grown", "", _number(self.after), f"{self.last['parameters']:,}", epochs]]
        for name, control in self.controls.items():
            parameters, trained = (f"{control[key]:,}" if key in control else "" for key in ("parameters", "epochs"))
            compared = self._gain(control["score"], self.after)
            rows.append([name, compared, _number(control["score"]), parameters, trained])
        columns = ("network", "the grown one is", f"best {self.metric}", "parameters", "epochs")
        return [heading, Table("Grown and plain networks", columns, rows, columns[1:2])]

    def layers(self) -> list[Block]:
        """What grew where, and how well its candidates correlated with the errors there."""
        layers: Mapping[str, Any] = self.last.get("layers", {})
        sets = [record for record in self.history if record["correlation"]]
        names = list(dict.fromkeys([*layers, *(name for record in sets for name in record["correlation"])]))
        if not names:
            return []
        blocks: list[Block] = [Heading("Layers")]
        if "form_reason" in self.last:
            blocks.append(Paragraph(_sentence(f"Dendrites are {self.last['form']}: {self.last['form_reason']}")))
        if layers:
            known = set.intersection(*(set(layer) for layer in layers.values()))
            counts = {key: title for key, title in _LAYER_COUNTS.items() if key in known}
            columns = ("layer", "type", *counts.values())
            rows = [
                [Name(name or "model"), layer["type"], *(_count(layer[key]) for key in counts)]
                for name, layer in layers.items()
            ]
            blocks.append(Table("Layers that can grow", columns, rows, ("type",)))
        if sets:
            shows = "Absolute correlation of the best candidates with their neurons' errors, by layer and cycle."
            note = "Mean over a layer's neurons, and the largest, at the end of each correlation phase. Near 0 there is"
            found = [[record["correlation"].get(name) for record in sets] for name in names]
            blocks += [
                Picture("correlations", shows, lambda theme: draw_correlations(self.history, theme)),
                Paragraph(f"{shows} {note} nothing left in a layer that a dendrite could explain."),
                Table(
                    "Correlations",
                    ("layer", *(f"cycle {record['cycle']}: mean, largest" for record in sets)),
                    [
                        [Name(name or "model"), *(f"{f['mean']:.3f}, {f['max']:.3f}" if f else "" for f in row)]
                        for name, row in zip(names, found, strict=True)
                    ],
                ),
            ]
        return blocks

    def cost(self) -> list[Block]:
        """Parameters, and what a step costs by the matrix products of the target layers."""
        if "multiplications" in self.last:
            return self._absolute_cost()
        if "units" in self.last and "inference_cost" not in self.last:  # an older record
            return []
        inference = [self._inference(record) for record in (self.first, self.last)]
        pool = max((record.get("candidates", 0) for record in self.history), default=0)
        rows = [
            ["parameters", f"{self.first['parameters']:,}", f"{self.last['parameters']:,}"],
            ["inference", *(f"{cost:.2f}" for cost in inference)],
            ["training step, base phase", *(f"{base_step_cost(cost - 1, self.live):.2f}" for cost in inference)],
        ]
        if pool:
            name = f"training step, correlation phase ({_count(pool, 'candidate')})"
            phases = [record for record in self.history if record["phase"] == "correlation"]
            # Of the first and the last of these phases, with the dendrites that there were before and are after.
            steps = [
                self._step(record, pool) + (cost - self._inference(record)) / 3
                for record, cost in zip((phases[0], phases[-1]), inference, strict=True)
            ]
            rows.append([name, *(f"{step:.2f}" for step in steps)])
        spent = sum(record["epochs"] * self._step(record, pool) for record in self.history)
        epochs = sum(record["epochs"] for record in self.history)
        note = (
            "Of the layers that grow, by the weights of their matrix products: 1 is the same step of the plain layers."
            " What a clock says depends on the size of the layers and on the machine."
        )
        if pool or not any(record["phase"] == "correlation" for record in self.history):
            note += f" The {epochs} epochs of this fit cost what {spent:.0f} epochs of the plain layers do."
        return [Heading("Cost"), Table("Cost", ("", "before", "after"), rows), Paragraph(note)]

    def _absolute_cost(self) -> list[Block]:
        names = {"parameters": "parameters", "multiplications": "multiplications, inference"}
        rows = [[name, *(f"{r[key]:,}" for r in (self.first, self.last))] for key, name in names.items()]
        note = (
            "Of what grows, at each position of each example: the network has no matrix products of its own there that"
            " these could be measured by. A unit has one for each input that it sees and each output that it feeds."
        )
        return [Heading("Cost"), Table("Cost", ("", "before", "after"), rows), Paragraph(note)]

    def _inference(self, record: Record) -> float:
        # Older records do not say; dense dendrites on every neuron cost what their number says.
        return float(record.get("inference_cost", inference_cost(record["dendrites"])))

    def _step(self, record: Record, pool: int) -> float:
        dendrites = self._inference(record) - 1
        if record["phase"] == "base":
            return base_step_cost(dendrites, self.live)
        return float(record.get("step_cost", correlation_step_cost(dendrites, pool)))

    def left_alone(self) -> list[Block]:
        """The layers without dendrites, by reason."""
        skipped = self.history[-1].get("skipped", {})
        items = [
            [*[part for name in names for part in (", ", Name(name or "model"))][1:], f": {reason}"]
            for reason, names in by_reason(skipped).items()
        ]
        return [Heading("Layers left alone"), Items(items)] if items else []

    def phases(self) -> list[Block]:
        """Why each phase ended, in the order of time."""
        items = [
            f"{record['phase'].capitalize()} phase of cycle {record['cycle']}, epochs {start} to"
            f" {start + record['epochs']}: {record['reason'] or _RUNNING}"
            for record, start in zip(self.history, self.starts, strict=True)
        ]
        return [Heading("Why each phase ended"), Items(items, ordered=True)]


def _number(score: float | None) -> str:
    return "none" if score is None else f"{score:.4g}"


def _count(number: int | None, thing: str = "") -> str:
    if not thing:
        return "" if number is None else f"{number:,}"
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
