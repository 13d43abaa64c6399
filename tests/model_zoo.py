"""Small versions of the models that people train, each a row of ``docs/layers.md`` and of ``test_model_zoo.py``.

To add one, write a function that returns a network and a batch, and put it into ``MODELS`` by ``@model(name)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos import boring_classes as boring
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.utils.checkpoint import checkpoint

Make = Callable[[], tuple[nn.Module, Any]]
MODELS: dict[str, Make] = {}
MISSING: dict[str, str] = {}


def model(name: str, needs: str = "torch") -> Callable[[Make], Make]:
    """Put a function that returns a network, or a LightningModule, and a batch for it into the table.

    Args:
        name: what the table calls it.
        needs: the package that it comes from; where that is not installed the model is not tried.
    """

    def register(make: Make) -> Make:
        MODELS[name] = make
        if find_spec(needs) is None:
            MISSING[name] = f"{needs} is not installed"
        return make

    return register


def make(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A network of the table and a batch for it, always the same."""
    torch.manual_seed(seed)
    return MODELS[name]()


def call(network: nn.Module, batch: Any) -> tuple[Tensor, ...]:
    """All the tensors that a network gives for a batch."""
    return tensors(network(*batch) if isinstance(batch, tuple | list) else network(batch))


def tensors(value: Any) -> tuple[Tensor, ...]:
    """The floating point tensors within whatever a module returns."""
    if isinstance(value, Tensor):
        return (value,) if value.is_floating_point() else ()
    if isinstance(value, Mapping):
        value = list(value.values())
    return tuple(tensor for item in value for tensor in tensors(item)) if isinstance(value, list | tuple) else ()


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """An error that differs from sample to sample and from neuron to neuron, for outputs of any kind."""
    wide = [output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs]
    targets = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out) for out in wide]
    return torch.stack([(out - target).square().mean() for out, target in zip(wide, targets, strict=True)]).sum()


class Trained(L.LightningModule):
    """A network of the table, trained in the plainest way."""

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make(name, seed)[0]

    def forward(self, *batch: Any) -> Any:
        return self.net(*batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(call(self, batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(call(self, batch)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def trainable(name: str, seed: int = 0) -> L.LightningModule:
    """A LightningModule for a network of the table."""
    network = make(name, seed)[0]
    return network if isinstance(network, L.LightningModule) else Trained(name, seed)


# -- transformers -------------------------------------------------------------------------------------------------


@model("`nn.TransformerEncoder` with a padding mask")
def encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    lengths = torch.tensor([5, 3, 1, 4])
    return PaddedEncoder(nn.TransformerEncoder(layer, 2)), (torch.randn(4, 5, 8), torch.arange(5) >= lengths[:, None])


class PaddedEncoder(nn.Module):
    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        encoded = self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        return self.head(encoded.sum(1) / (~padding).sum(1, keepdim=True))


@model("`nn.Transformer`")
def transformer() -> tuple[nn.Module, Any]:
    network = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
    return network, (torch.randn(3, 5, 8), torch.randn(3, 4, 8))


@model("Hugging Face's `BertForSequenceClassification`", needs="transformers")
def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=11, max_position_embeddings=8, **sizes)
    tokens, mask = torch.randint(11, (4, 5)), torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    return BertForSequenceClassification(config), (tokens, mask.long())


class DtypeReader(nn.Module):
    """Looks at the dtype, the size and the type of its own layers, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(6, 8)
        self.wo = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.wo, nn.Linear)
        assert self.wi.weight.shape == (self.wi.out_features, self.wi.in_features)
        hidden = self.wi(x.to(self.wi.weight.dtype)).relu()
        return self.wo(hidden.to(self.wo.weight.dtype))


@model("a model that reads `layer.weight.dtype` of its own layers")
def dtype_reader() -> tuple[nn.Module, Any]:
    return DtypeReader(), torch.randn(8, 6, dtype=torch.float64)


# -- images -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def resnet() -> nn.Sequential:
    # Eight, for with inputs that are no multiple of it PyTorch 2.13's weight gradient of the shortcut (1 x 1, stride 2)
    # writes past its memory in `channels_last`, on CPUs without AVX-512.
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(*stem, Block(8, 8, 1), Block(8, 6, 2), *head)


@model("ResNet with BatchNorm and in-place activations")
def plain_resnet() -> tuple[nn.Module, Any]:
    return resnet(), torch.randn(4, 3, 8, 8)


@model("the same in `channels_last`")
def channels_last() -> tuple[nn.Module, Any]:
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    return resnet().to(memory_format=torch.channels_last), images


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        up = self.up(self.bottom(skip), output_size=skip.shape)
        return self.out(torch.cat([skip, up], 1))


@model("U-Net with transposed convolutions")
def unet() -> tuple[nn.Module, Any]:
    return UNet(), torch.randn(2, 1, 7, 7)


@model("MobileNet block: depthwise and pointwise convolutions")
def mobilenet() -> tuple[nn.Module, Any]:
    expand = [nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Hardswish(inplace=True)]
    depthwise = [nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)]
    return nn.Sequential(*expand, *depthwise, nn.Conv2d(6, 4, 1)), torch.randn(2, 3, 6, 6)


class Mixer(nn.Module):
    def __init__(self, tokens: int = 4, channels: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(channels, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, channels))
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


@model("MLP-Mixer")
def mixer() -> tuple[nn.Module, Any]:
    return Mixer(), torch.randn(3, 3, 8, 8)


class VAE(nn.Module):
    """Two heads on one trunk, and random numbers in the middle of a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(6, 3), nn.Linear(6, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return {"reconstruction": self.decoder(z), "mean": mean, "log_variance": log_variance}


@model("VAE with two heads")
def vae() -> tuple[nn.Module, Any]:
    return VAE(), torch.randn(8, 8)


# -- sequences ----------------------------------------------------------------------------------------------------


class TiedLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 11, size: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.hidden(self.embedding(tokens)).tanh())


TIED = "tied weights: embedding and output layer share one parameter"


@model(TIED)
def tied() -> tuple[nn.Module, Any]:
    return TiedLanguageModel(), torch.randint(11, (4, 5))


class CharacterModel(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], vocabulary: int = 9, size: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.recurrent = kind(size, size, batch_first=True)
        self.head = nn.Linear(size, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(characters))[0])


@model("GRU character model")
def gru() -> tuple[nn.Module, Any]:
    return CharacterModel(nn.GRU), torch.randint(9, (4, 5))


@model("LSTM character model")
def lstm() -> tuple[nn.Module, Any]:
    return CharacterModel(nn.LSTM), torch.randint(9, (4, 5))


# -- structure ----------------------------------------------------------------------------------------------------


class Recursive(nn.Module):
    """One block used three times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


@model("weight sharing: one block used three times in a forward pass")
def recursive() -> tuple[nn.Module, Any]:
    return Recursive(), torch.randn(8, 5)


class Nested(nn.Module):
    """Lists in dicts in lists, a module under two names, and a branch that is never taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"main": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "gate": nn.Linear(4, 4)})
            for _ in range(2)
        )
        self.stages[1]["gate"] = self.stages[0]["gate"]
        self.branches = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            first, second = stage["main"]
            x = second(first(x).relu()) * stage["gate"](x).sigmoid()
        return self.branches["used"](x)


@model("deeply nested `ModuleList` and `ModuleDict`, a shared module, a branch never taken")
def nested() -> tuple[nn.Module, Any]:
    return Nested(), torch.randn(8, 4)


class Frozen(nn.Module):
    """A backbone that is not to change, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((-2, -1)))


FROZEN = "frozen backbone and a head"


@model(FROZEN)
def frozen() -> tuple[nn.Module, Any]:
    return Frozen(), torch.randn(4, 3, 6, 6)


class Checkpointed(nn.Module):
    """Activation checkpointing: the block's forward runs again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.block = nn.Sequential(nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.1), nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))


@model("activation checkpointing, `use_reentrant=False`")
def checkpointed() -> tuple[nn.Module, Any]:
    return Checkpointed(False), torch.randn(8, 5)


@model("activation checkpointing, `use_reentrant=True`")
def checkpointed_reentrant() -> tuple[nn.Module, Any]:
    return Checkpointed(True), torch.randn(8, 5)


@model("lazy layers after a first forward pass")
def lazy() -> tuple[nn.Module, Any]:
    network = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    batch = torch.randn(4, 2, 7)
    network(batch)
    return network, batch


@model("a part under `torch.compile`")
def compiled() -> tuple[nn.Module, Any]:
    body = torch.compile(nn.Sequential(nn.Linear(5, 6), nn.ReLU()), backend="eager")
    return nn.Sequential(body, nn.Linear(6, 2)), torch.randn(8, 5)


# -- weights that are computed, and other dtypes ------------------------------------------------------------------


def normed(norm: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Any]:
    layers = [norm(nn.Conv1d(3, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(20, 3))]
    return nn.Sequential(*layers), torch.randn(6, 3, 7)


@model("`torch.nn.utils.parametrizations.weight_norm`")
def weight_normed() -> tuple[nn.Module, Any]:
    return normed(parametrizations.weight_norm)


@model("`torch.nn.utils.parametrizations.spectral_norm`")
def spectral_normed() -> tuple[nn.Module, Any]:
    return normed(parametrizations.spectral_norm)


@model("`torch.nn.utils.weight_norm` (hooks)")
def weight_normed_by_hooks() -> tuple[nn.Module, Any]:
    return normed(hooked_weight_norm)


@model("`torch.nn.utils.spectral_norm` (hooks)")
def spectral_normed_by_hooks() -> tuple[nn.Module, Any]:
    return normed(hooked_spectral_norm)


def of_dtype(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    layers = [nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4), nn.LayerNorm(4), nn.Linear(4, 2)]
    return nn.Sequential(*layers).to(dtype), torch.randn(8, 2, 7).to(dtype)


@model("parameters in `float64`")
def float64() -> tuple[nn.Module, Any]:
    return of_dtype(torch.float64)


@model("parameters in `bfloat16`")
def bfloat16() -> tuple[nn.Module, Any]:
    return of_dtype(torch.bfloat16)


@model("parameters in `float16`")
def float16() -> tuple[nn.Module, Any]:
    return of_dtype(torch.float16)


# -- Lightning's demos: modules of their own, given a validation where they have none -----------------------------


class ValidatedBoringModel(boring.BoringModel):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))


class ManualBoringModel(boring.ManualOptimBoringModel):
    validation_step = ValidatedBoringModel.validation_step


class ValidatedDemoModel(boring.DemoModel):
    """The demo with a rate at which its activations do not all die at once."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.001)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class SmallTransformer(LightningTransformer):
    """The demo without its download and with fewer words."""

    def __init__(self) -> None:
        super().__init__(vocab_size=11)
        self.model = Transformer(vocab_size=11, ninp=8, nhead=2, nhid=8, nlayers=1)

    def prepare_data(self) -> None:
        pass

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class SmallLSTM(LightningLSTM):
    """The demo without its download and with fewer words."""

    def __init__(self) -> None:
        super().__init__(vocab_size=11)
        self.model = SimpleLSTM(vocab_size=11, ninp=6, nhid=6, nlayers=2)

    def prepare_data(self) -> None:
        pass

    def forward(self, characters: Tensor, target: Tensor) -> Tensor:
        return self.model(characters, self.model.init_hidden(len(characters)))[0]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.nll_loss(self(*batch), batch[1].view(-1)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@model("Lightning's `BoringModel`")
def boring_model() -> tuple[nn.Module, Any]:
    return ValidatedBoringModel(), torch.randn(4, 32)


@model("Lightning's `ManualOptimBoringModel`")
def manual_boring_model() -> tuple[nn.Module, Any]:
    return ManualBoringModel(), torch.randn(4, 32)


@model("Lightning's `DemoModel`")
def demo_model() -> tuple[nn.Module, Any]:
    return ValidatedDemoModel(), torch.randn(4, 32)


@model("Lightning's `Net` for MNIST")
def mnist_net() -> tuple[nn.Module, Any]:
    return boring.Net(), torch.randn(2, 1, 28, 28)


@model("Lightning's `LightningTransformer`")
def lightning_transformer() -> tuple[nn.Module, Any]:
    return SmallTransformer(), (torch.randint(11, (3, 5)), torch.randint(11, (3, 5)))


@model("Lightning's `LightningLSTM`")
def lightning_lstm() -> tuple[nn.Module, Any]:
    return SmallLSTM(), (torch.randint(11, (3, 5)), torch.randint(11, (3, 5)))
