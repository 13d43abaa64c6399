"""What can have dendrites and what is left alone, tried out and written into ``docs/layers.md``.

``python -m tests.layer_table`` writes the page anew. A layer gets a row by an entry in ``LAYERS``, a model by one in
:mod:`tests.model_zoo`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pl_dendrites.core import attach
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.targets import reasons_against, select_targets
from tests.model_zoo import MISSING, MODELS, call, loss_of, make

PAGE = Path(__file__).parents[1] / "docs" / "layers.md"
COMMAND = "python -m tests.layer_table"


def _after_a_pass() -> tuple[nn.Module, Any]:
    layer, batch = nn.LazyConv2d(4, 3), torch.randn(2, 3, 5, 5)
    layer(batch)
    return layer, batch


def _of_integers() -> nn.Module:
    layer = nn.Linear(5, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.int8), requires_grad=False)
    return layer


class Same(nn.Linear):
    """A subclass that overrides nothing about what is computed."""


class Causal(nn.Conv1d):
    """A convolution that pads its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve."""
        return super().forward(nn.functional.pad(x, (2, 0)))


class Flat(nn.Conv1d):
    """A convolution whose channels lie one after another in its output."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and flatten."""
        return super().forward(x).flatten(1)


class Conv1D(nn.Module):
    """As Hugging Face has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        """A linear layer."""
        return x @ self.weight


def _adapter() -> nn.Module:
    return nn.ModuleDict({"base_layer": nn.Linear(5, 3), "lora_A": nn.Linear(5, 2), "lora_B": nn.Linear(2, 3)})


def _replaced() -> nn.Module:
    layer = nn.Linear(5, 3)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    return layer


def _sequence() -> Tensor:
    return torch.randn(3, 7, 5)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "`Linear` on `(N, C)`": lambda: (nn.Linear(5, 3), torch.randn(7, 5)),
    "`Linear` on `(N, ..., C)`": lambda: (nn.Linear(5, 3), torch.randn(2, 3, 2, 5)),
    "`Conv1d`": lambda: (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 7)),
    "`Conv2d`": lambda: (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)),
    "`Conv3d`": lambda: (nn.Conv3d(3, 4, 2), torch.randn(2, 3, 4, 4, 4)),
    "`ConvTranspose1d`": lambda: (nn.ConvTranspose1d(3, 4, 3, stride=2), torch.randn(2, 3, 5)),
    "`ConvTranspose2d`": lambda: (nn.ConvTranspose2d(3, 4, 3, stride=2), torch.randn(2, 3, 4, 4)),
    "`ConvTranspose3d`": lambda: (nn.ConvTranspose3d(3, 4, 2), torch.randn(2, 3, 3, 3, 3)),
    "grouped convolution": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    "depthwise convolution": lambda: (nn.Conv2d(4, 8, 3, groups=4), torch.randn(2, 4, 5, 5)),
    "convolution with `padding_mode`": lambda: (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        torch.randn(2, 2, 5, 5),
    ),
    "lazy layer before its first forward pass": lambda: (nn.LazyConv2d(4, 3), torch.randn(2, 3, 5, 5)),
    "lazy layer after it": _after_a_pass,
    "layer with `parametrizations.weight_norm`": lambda: (
        parametrizations.weight_norm(nn.Linear(5, 3)),
        torch.randn(7, 5),
    ),
    "layer with `parametrizations.spectral_norm`": lambda: (
        parametrizations.spectral_norm(nn.Linear(5, 3)).eval(),
        torch.randn(7, 5),
    ),
    "layer with `parametrizations.orthogonal`": lambda: (
        parametrizations.orthogonal(nn.Linear(5, 3)),
        torch.randn(7, 5),
    ),
    "subclass that computes as its base does": lambda: (Same(5, 3), torch.randn(7, 5)),
    "subclass with a `forward` of its own: pads, crops, transposes, ...": lambda: (
        Causal(3, 4, 3),
        torch.randn(2, 3, 7),
    ),
    "such a subclass whose neurons cannot be told": lambda: (Flat(3, 4, 3), torch.randn(2, 3, 7)),
    "layer whose `forward` was replaced on the instance": lambda: (_replaced(), torch.randn(7, 5)),
    "Hugging Face's `Conv1D` (GPT-2)": lambda: (Conv1D(3, 5), torch.randn(7, 5)),
    "layer that an adapter (LoRA) wraps, and the adapter's own": lambda: (_adapter(), torch.randn(7, 5)),
    "frozen layer": lambda: (nn.Linear(5, 3).requires_grad_(False), torch.randn(7, 5)),
    "layer with integer weights": lambda: (_of_integers(), torch.randn(7, 5)),
    "`LSTM`": lambda: (nn.LSTM(5, 4, batch_first=True), _sequence()),
    "`GRU`": lambda: (nn.GRU(5, 4, batch_first=True), _sequence()),
    "`RNN`": lambda: (nn.RNN(5, 4, batch_first=True), _sequence()),
    "`LSTMCell`": lambda: (nn.LSTMCell(5, 4), torch.randn(7, 5)),
    "`GRUCell`": lambda: (nn.GRUCell(5, 4), torch.randn(7, 5)),
    "`RNNCell`": lambda: (nn.RNNCell(5, 4), torch.randn(7, 5)),
    "`MultiheadAttention`": lambda: (nn.MultiheadAttention(4, 2, batch_first=True), (torch.randn(2, 3, 4),) * 3),
    "`Bilinear`": lambda: (nn.Bilinear(3, 4, 2), (torch.randn(7, 3), torch.randn(7, 4))),
    "`Embedding`": lambda: (nn.Embedding(9, 4), torch.randint(9, (3, 5))),
    "`EmbeddingBag`": lambda: (nn.EmbeddingBag(9, 4), torch.randint(9, (3, 5))),
    "`BatchNorm2d`": lambda: (nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4)),
    "`LayerNorm`": lambda: (nn.LayerNorm(5), torch.randn(7, 5)),
    "`PReLU`": lambda: (nn.PReLU(5), torch.randn(7, 5)),
}


class OwnBlock(nn.Module):
    """A gated block that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.norm = nn.Linear(5, 4), nn.Linear(5, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(x).sigmoid()
        return self.norm(self.value(x) * gate), gate


NAMED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "a Linear with its norm: `nn.Sequential(Linear, LayerNorm)`": lambda: (
        nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)),
        torch.randn(7, 5),
    ),
    "a convolution with its norm and activation": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(inplace=True)),
        torch.randn(2, 3, 5, 5),
    ),
    "a module of one's own that returns a tuple": lambda: (OwnBlock(), _sequence()),
    "`MultiheadAttention`": LAYERS["`MultiheadAttention`"],
    "`TransformerEncoderLayer`": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        torch.randn(2, 3, 8),
    ),
    "`Bilinear`": LAYERS["`Bilinear`"],
    "a module with parametrizations inside": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4))),
        torch.randn(7, 5),
    ),
    "`Embedding`": LAYERS["`Embedding`"],
    "`LayerNorm`": LAYERS["`LayerNorm`"],
    "`ModuleList`": lambda: (nn.ModuleList([nn.Linear(5, 4)]), torch.randn(7, 5)),
}


def try_layer(name: str, named: bool = False) -> str:
    """Grow a layer for which that is possible, and say so; otherwise say why not.

    Raises:
        AssertionError: if dendrites with output weights of zero change the output, or if others do not.
    """
    torch.manual_seed(0)
    layer, batch = (NAMED if named else LAYERS)[name]()
    model = nn.ModuleDict({"layer": layer.double()})
    # As a user who asks for nothing would have it; one layer beside it, so that there always is one that can.
    if named:
        reason = reasons_against(model, {layer})[layer]
    else:
        selection = select_targets(nn.ModuleDict({**model, "other": nn.Linear(1, 1)}))
        inside = layer._modules.get("base_layer", layer)
        reason = selection.skipped.get("layer") or reasons_against(model)[inside]
    if reason is not None:
        return f"left alone: {reason}"
    doubled = tuple(_double(part) for part in batch) if isinstance(batch, tuple) else _double(batch)
    before = call(layer, doubled)
    network = attach(model, ["layer"] if named else None)
    assert all(torch.equal(*pair) for pair in zip(before, call(layer, doubled), strict=True)), "attaching"
    if not network.can_grow():
        return f"left alone: {network.skipped['layer']}"
    network.start_candidates(pool=2)
    loss_of(call(layer, doubled)).backward()
    assert list(network.integrate()) == ["layer"]
    assert all(torch.equal(*pair) for pair in zip(before, call(layer, doubled), strict=True)), "integrating"
    with torch.no_grad():
        network.layers["layer"][0].weights[0].fill_(0.5)
    assert not torch.allclose(before[0], call(layer, doubled)[0]), "a dendrite"
    return "works"


def _double(part: Tensor) -> Tensor:
    return part.double() if part.is_floating_point() else part


def try_model(name: str) -> tuple[str, str]:
    """Which layers of a model grow, by type, and which are left alone with the reason."""
    network, batch = make(name)
    grown = attach(network)
    grown.start_candidates(pool=1)
    loss_of(call(network.train(), batch)).backward()
    layers = {name: grown._hosts[name] for name in grown.layers}
    taken = grown.integrate()
    modules = {plain_name(name): module for name, module in network.named_modules(remove_duplicate=False)}
    reasons: dict[str, list[nn.Module]] = {}
    for skipped, why in grown.skipped.items():
        reasons.setdefault(why, []).append(modules[skipped])
    left = "; ".join(f"{_types(those)}: {why}" for why, those in reasons.items())
    return _types(layers[name] for name in taken), left


def _types(modules: Iterable[nn.Module]) -> str:
    counts = Counter(type(module).__name__ for module in modules)
    return ", ".join(f"{count} `{kind}`" for kind, count in counts.items())


def layer_rows() -> list[str]:
    """The first table, tried out."""
    return [f"| {name} | {try_layer(name)} |" for name in LAYERS]


def named_rows() -> list[str]:
    """The second table, tried out."""
    return [f"| {name} | {try_layer(name, named=True)} |" for name in NAMED]


def model_rows() -> list[str]:
    """The third table, tried out but for models whose package is missing: their rows stay."""
    before = {row.split(" | ")[0][2:]: row for row in written("models")}
    return [
        before.get(name, "") if name in MISSING else "| " + " | ".join([name, *try_model(name)]) + " |"
        for name in MODELS
    ]


def written(which: str) -> list[str]:
    """The rows of a table as they stand on the page."""
    return _table(which).splitlines()[2:]


def _table(which: str) -> str:
    return PAGE.read_text().partition(f"<!-- {which}: begin -->\n")[2].partition(f"<!-- {which}: end -->")[0]


def main() -> None:
    """Write all tables anew."""
    for which, rows in (("layers", layer_rows()), ("named", named_rows()), ("models", model_rows())):
        before = _table(which)
        head = before.splitlines()[:2]
        PAGE.write_text(PAGE.read_text().replace(before, "\n".join([*head, *rows]) + "\n"))


if __name__ == "__main__":
    main()
