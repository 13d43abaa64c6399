"""The callback is configured in YAML as in code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from pl_dendrites import DendriteCallback
from tests.models import Classifier, bits, loaders, same_bits

CONFIG = """
trainer:
  max_epochs: 6
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: pl_dendrites.DendriteCallback
      init_args:
        monitor: val_loss
        base_epochs: 2
        max_correlation_epochs: 2
        max_dendrites: 1
        exclude: ["net.4"]
        optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
"""


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders()[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]


def test_a_fit_from_yaml_beside_a_learning_rate_monitor(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    made: list[torch.optim.Optimizer] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            phase = dendrites_of(trainer)._fit._correlation
            if phase is not None:
                made.append(phase._optimizer)

    cli = LightningCLI(
        Classifier, Data, args=["fit", "--config", "config.yaml"], trainer_defaults={"callbacks": [Watch()]}
    )
    dendrites = dendrites_of(cli.trainer)
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]
    assert list(dendrites.network.layers) == ["net.0"]
    assert isinstance(made[0], torch.optim.SGD)
    assert made[0].param_groups[0]["lr"] == 0.1


def run(config: str, *arguments: str) -> LightningCLI:
    return LightningCLI(Classifier, Data, args=["fit", "--config", config, *arguments], seed_everything_default=3)


def test_the_saved_config_gives_the_same_bits_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    first = run("config.yaml", "--trainer.callbacks.candidates=3", "--trainer.callbacks.targets=[Linear]")
    saved = Path(first.trainer.log_dir) / "config.yaml"
    assert "lr: 0.1" in saved.read_text()
    again = run(str(saved))
    assert dendrites_of(again.trainer).history == dendrites_of(first.trainer).history
    assert same_bits(bits(again.model), bits(first.model))
    other = run(str(saved), "--trainer.callbacks.candidates=1")
    assert not same_bits(bits(other.model), bits(first.model))


@pytest.mark.parametrize(
    ("page", "monitor", "grows"),
    [("README.md", "val_loss", ["net.0", "net.4"]), ("docs/guides/cli.md", "val_acc", [""])],
)
def test_the_config_on_a_page(page: str, monitor: str, grows: list[str]) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[1] / page).read_text(), re.DOTALL)
    Path("config.yaml").write_text(block)
    dendrites = dendrites_of(run("config.yaml", "--trainer.max_epochs=1", "--trainer.accelerator=cpu").trainer)
    assert dendrites.monitor == monitor
    assert list(dendrites.network.layers) == grows


@pytest.mark.parametrize("name", ["pl_dendrites.DendriteCallback", "DendriteCallback"])
def test_by_class_path_and_by_short_name(name: str) -> None:
    arguments = [f"--trainer.callbacks+={name}", "--trainer.callbacks.monitor=val_acc", "--trainer.callbacks.mode=max"]
    arguments += ["--trainer.callbacks.mirrors={target_net: net}", "--trainer.callbacks.targets=frozen"]
    cli = LightningCLI(Classifier, Data, args=arguments, run=False)
    dendrites = dendrites_of(cli.trainer)
    assert type(dendrites) is DendriteCallback
    assert (dendrites.monitor, dendrites.mode) == ("val_acc", "max")
    assert dendrites._settings.mirrors == {"target_net": "net"}
    assert dendrites._settings.attached["targets"] == "frozen"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("monitr", "val_loss", r"monitr"),
        ("mode", "maximum", r"Expected a typing.Literal\['min', 'max'\]"),
        ("patience", "soon", r"Expected a <class 'int'>"),
        ("patience", "0", r"`patience` must be an integer of at least 1, got 0"),
        ("mirrors", "{net: net}", r"`mirrors`: 'net' cannot mirror 'net'"),
        ("mirrors", "[target_net]", r"Expected a .*Mapping"),
        ("optimizer.class_path", "torch.optim.Adm", r"torch.optim.Adm"),
    ],
)
def test_what_is_not_known_or_allowed_is_refused(
    key: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trainer.callbacks+=DendriteCallback", "--trainer.callbacks.monitor=val_loss"]
    with pytest.raises((SystemExit, ValueError)) as error:
        LightningCLI(Classifier, Data, args=[*arguments, f"--trainer.callbacks.{key}={value}"], run=False)
    assert re.search(says, f"{error.value}{capsys.readouterr().err}")


def test_help_describes_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        LightningCLI(Classifier, Data, args=["--trainer.callbacks.help=DendriteCallback"], run=False)
    shown = capsys.readouterr().out
    assert "Grows dendrites on a model" in shown
    for name, parameter in inspect.signature(DendriteCallback).parameters.items():
        entry = re.search(rf"\n  --trainer\.callbacks\.{name}\b(?!\.)[^\n]*\n((?: {{20,}}[^\n]*\n?)+)", shown)
        assert entry, name
        described, _, rest = " ".join(entry[1].split()).partition("(required" if name == "monitor" else "(type:")
        assert len(described.split()) >= 4, name
        assert name == "monitor" or "default:" in rest
        assert parameter.kind is not parameter.VAR_KEYWORD


def dendrites_of(trainer: L.Trainer) -> DendriteCallback:
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, DendriteCallback))
    return callback
