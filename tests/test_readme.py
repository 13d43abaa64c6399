"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tests.models import Classifier, classifier, loaders

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders()[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]

    test_dataloader = val_dataloader


def test_every_block_in_the_order_of_the_page() -> None:
    names: dict[str, Any] = {"model": classifier(), "datamodule": Data(), "MyModel": Classifier}
    exec(BLOCKS[0], names)
    assert names["dendrites"].summary().count("\n") >= 3
    names["trainer"].save_checkpoint("best.ckpt")
    exec(BLOCKS[1], names)
    names |= {"net": Classifier(), "state_dict": torch.load("best.ckpt", weights_only=True)["state_dict"]}
    exec(BLOCKS[2], names)
    assert len(BLOCKS) == 4
    assert 'strategy="ddp"' in BLOCKS[3], "which would start processes; tests/test_ddp.py does"
    x = torch.randn(5, 4)
    assert torch.equal(names["net"].eval()(x), names["model"].eval()(x))
