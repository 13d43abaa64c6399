"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from tests.models import Classifier, classifier, loaders

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders()[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]

    test_dataloader = val_dataloader


def test_every_block_in_the_order_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"model": classifier(), "datamodule": Data(), "MyModel": Classifier}
    exec(BLOCKS[0], names)
    assert names["dendrites"].summary().count("\n") >= 3
    names["trainer"].save_checkpoint("best.ckpt")
    exec(BLOCKS[1], names)
    names |= {"net": Classifier(), "state_dict": torch.load("best.ckpt", weights_only=True)["state_dict"]}
    exec(BLOCKS[2], names)
    assert len(BLOCKS) == 7
    parts = {"encoder": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), "rnn": nn.LSTM(3, 3)}
    exec(BLOCKS[3], names | {"model": nn.ModuleDict(parts)})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["encoder.1", "rnn"]
    exec(BLOCKS[4], names | {"nn": nn})
    assert 'strategy="ddp"' in BLOCKS[5], "which would start processes; tests/test_ddp.py does"
    assert "strategy=strategy" in BLOCKS[6], "and tests/test_fsdp.py"
    x = torch.randn(5, 4)
    assert torch.equal(names["net"].eval()(x), names["model"].eval()(x))
