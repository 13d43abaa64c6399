"""What a fit says on a terminal, beside both of Lightning's bars, and the words of it."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import struct
import termios
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from pl_dendrites.reporting.tables import summary_table
from pl_dendrites.reporting.verdicts import result_line, set_line
from tests.models import Classifier, classifier, quick, train
from tests.processes import process

WIDTH = 80


class Model(Classifier):
    """One with a metric of its own on the bar."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("mine", loss, prog_bar=True)
        return loss


def fits() -> None:
    """Beside each of the two bars."""
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm"
    for bar in (RichProgressBar(), TQDMProgressBar(refresh_rate=4)):
        print(type(bar).__name__)  # noqa: T201
        torch.manual_seed(0)
        dendrites = quick(verbose=True, max_dendrites=1, base_epochs=1, max_correlation_epochs=1)
        train(Model(), dendrites, bar, enable_progress_bar=True)


class Screen:
    """A terminal of endless height, as far as progress bars write to one."""

    def __init__(self, text: str) -> None:
        self.rows, self.row, self.column = [""], 0, 0
        for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|.", text, re.DOTALL):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self._go_down()
        elif not part.startswith("\x1b"):
            if self.column == WIDTH:
                self._go_down()
                self.column = 0
            line = self.rows[self.row].ljust(WIDTH)
            self.rows[self.row] = line[: self.column] + part + line[self.column + 1 :]
            self.column += 1
        elif part.endswith("A"):
            self.row -= int(part[2:-1] or 1)
        elif part.endswith("K"):
            assert part == "\x1b[2K"
            self.rows[self.row] = ""

    def _go_down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    def said(self) -> list[str]:
        """Lines of ours that begin where a row does, joined where the terminal broke them."""
        rows, lines = [row.ljust(WIDTH) for row in self.rows], []
        for i, row in enumerate(rows):
            if row.startswith("DendriteCallback: "):
                end = next(j for j in range(i, len(rows)) if rows[j].endswith(" "))
                lines.append("".join(rows[i : end + 1]).removeprefix("DendriteCallback: ").rstrip())
        return lines


def on_a_terminal(main: Callable[[], None]) -> str:
    """All that a process writes to a terminal of 80 columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    writer = process(os.ttyname(its), main)
    writer.start()
    written = os.read(ours, 65536)
    os.close(its)  # the writer has opened it
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # how Linux says that nobody is left at the other end
        pass
    os.close(ours)
    writer.join()
    assert writer.exitcode == 0, written.decode()
    return written.decode()


@pytest.fixture(scope="module")
def terminal() -> dict[str, str]:
    """What was written beside each bar."""
    text = on_a_terminal(fits)
    start, end = text.index("RichProgressBar\r\n"), text.index("TQDMProgressBar\r\n")
    return {"rich": text[start:end], "tqdm": text[end:]}


@pytest.mark.parametrize("bar", ["rich", "tqdm"])
def test_every_line_stays_on_the_terminal_and_says_whether_it_helped(terminal: dict[str, str], bar: str) -> None:
    said = Screen(terminal[bar]).said()
    assert len(said) == terminal[bar].count("DendriteCallback: ")
    if bar == "rich":
        assert "/-2" in said.pop(0)
    score = r"val_loss [\d.]+ -> [\d.]+( \([+-][\d.]+ %\))?"
    expected = [
        r"correlation phase of cycle 1, .*",
        r"base phase of cycle 1, .*",
        r"growth ends: .*",
        rf"set 1 kept: {score}, 108 parameters",
        rf"{score}: 1 of 1 set kept; the best network, 1 dendrite per neuron, 108 parameters, is in the model",
    ]
    for line, pattern in zip(said, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_the_models_own_metrics_stand_on_a_bar_of_80_columns(terminal: dict[str, str]) -> None:
    _, *states = re.findall(r"Epoch \d+: 100%[^\r]*", terminal["tqdm"])  # of the first there was none yet
    assert len(states) > 2
    assert all(re.search(r"mine=\d", state) for state in states)


# -- the words ----------------------------------------------------------------------------------------------------


def record(**others: Any) -> dict[str, Any]:
    common = {"accepted": None, "cycle": 1, "score": None, "best_score": None, "parameters": 1390, "monitor": "loss"}
    return common | others


@pytest.mark.parametrize(
    ("to_beat", "last", "line"),
    [
        (0.25, {"accepted": None}, ""),
        (0.25, {"accepted": True, "score": 0.2}, "set 1 kept: loss 0.25 -> 0.2 (-20.0 %), 1,390 parameters"),
        (-0.5, {"accepted": True, "score": -1.0}, "set 1 kept: loss -0.5 -> -1 (-100.0 %), 1,390 parameters"),
        (0.0, {"accepted": True, "score": -1.0}, "set 1 kept: loss 0 -> -1, 1,390 parameters"),
        (0.25, {"accepted": False, "score": 0.5}, "set 1 did not help and was taken away: loss 0.25 -> 0.5 (+100.0 %)"),
        (0.25, {"accepted": False, "score": 0.25}, "set 1 did not help and was taken away: loss 0.25 -> 0.25"),
        (
            0.25,
            {"accepted": False, "score": 0.2},
            "set 1 did not help and was taken away: loss 0.25 -> 0.2 (-20.0 %), less than min_delta asks for",
        ),
        (
            0.5,
            {"accepted": False, "score": 0.25, "mode": "max"},
            "set 1 did not help and was taken away: loss 0.5 -> 0.25 (-50.0 %)",
        ),
        (0.25, {"accepted": False}, "set 1 did not help and was taken away: no finite loss"),
        (None, {"accepted": True, "score": 0.2}, "set 1 kept: loss 0.2, 1,390 parameters"),
    ],
)
def test_a_set(to_beat: float | None, last: dict[str, Any], line: str) -> None:
    assert set_line([record(best_score=to_beat), record(**last)]) == line


def test_a_set_that_stays_whatever_its_score() -> None:
    before = record(best_score=0.25, units=4)
    after = record(accepted=False, score=0.5, units=12)
    line = "set 1 added: 8 shared dendrites, loss 0.25 -> 0.5 (+100.0 %), 1,390 parameters"
    assert set_line([before, after], stays=True) == line
    left = {"dendrites": 1, "units": 4, "parameters": 700}
    first = record(score=0.25, best_score=0.25)
    line = (
        "loss 0.25 -> 0.2 (-20.0 %): 1 set added; the best network, 4 shared dendrites, 700 parameters, is in the model"
    )
    assert result_line([first, after | {"best_score": 0.2}], left, stays=True) == line


@pytest.mark.parametrize(
    ("sets", "best", "line"),
    [
        ([], 0.25, "best loss 0.25: no set was tried; the best network,"),
        ([False, False], 0.25, "best loss 0.25: 0 of 2 sets kept; the best network,"),
        ([True, False], 0.2, "loss 0.25 -> 0.2 (-20.0 %): 1 of 2 sets kept; the best network,"),
        ([], None, "loss was never finite; the model,"),
    ],
)
def test_the_end(sets: list[bool], best: float | None, line: str) -> None:
    history = [record(score=best and 0.25), *(record(accepted=kept) for kept in sets)]
    history[-1]["best_score"] = best
    end = "is as training left it" if best is None else "is in the model"
    left = {"dendrites": 2, "parameters": 1390}
    assert result_line(history, left) == f"{line} 2 dendrites per neuron, 1,390 parameters, {end}"


def test_a_budget_says_of_each_set_what_it_added(caplog: pytest.LogCaptureFixture) -> None:
    dendrites = quick(verbose=True, around=["net"], fan_in=2, max_parameters=150, sets=2, growth_epochs=1)
    with caplog.at_level("INFO"):
        train(classifier(), dendrites)
    said = [line.split(": ", 1)[1] for line in caplog.messages if re.search(r"set \d (added|kept|did)", line)]
    sets = [entry for entry in dendrites.history if entry["accepted"] is not None]
    assert len(sets) == len(said) == 2
    for line, entry in zip(said, sets, strict=True):
        assert re.match(rf"set {entry['cycle']} added: \d+ shared dendrites?, val_loss", line)
        assert line.endswith(f"{entry['parameters']:,} parameters")


# -- the summary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", "validation/mean_average_precision/dataloader_idx_0"])
def test_the_summary_fits_100_columns_and_names_its_metric(metric: str) -> None:
    reason = "no improvement in 10 validations; it overfits; the set did not help and is discarded, a new one is tried"
    row = record(phase="base", dendrites=3, epochs=140, accepted=True, score=0.123456, reason=reason, monitor=metric)
    lines = summary_table([row, row | {"cycle": 2}]).splitlines()
    assert max(map(len, lines)) <= 100
    column = slice(lines[0].index("best"), lines[0].index("accepted"))
    head = "".join(line[column].strip() for line in itertools.takewhile(lambda line: "---" not in line, lines))
    assert head == f"best {metric}"
    why = " ".join(line[lines[0].index("why") :] for line in lines)
    assert " ".join(why.split()).count(reason) == 2
