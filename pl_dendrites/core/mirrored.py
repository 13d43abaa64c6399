"""The layers of mirrors, which have the dendrites of those that they mirror."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.growth.hooks import dendrites_of, hang, know_neurons, take_off
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.mirrors import mirrored_layers, own_parameters

__all__ = ["MirroredLayers"]


class MirroredLayers:
    """The layers of a model's mirrors that mirror one with dendrites, or one that is to have some.

    Of their dendrites that is trained which would be in the layer mirrored, if the mirror's own layer is trainable.

    Args:
        model: the model.
        mirrors: name of each mirror, and of what it mirrors.
        hosts: the layers that dendrites hang on, by name.

    Example:
        >>> model = nn.ModuleDict({"net": nn.Linear(2, 3), "target": nn.Linear(2, 3).requires_grad_(False)})
        >>> hang(model["net"])
        >>> mirrored = MirroredLayers(model, {"target": "net"}, {"net": model["net"]})
        >>> dendrites_of(model["net"]).grow(model["net"])
        >>> mirrored.follow()
        >>> dendrites_of(model["target"]).count, any(p.requires_grad for p in model["target"].parameters())
        (1, False)
    """

    def __init__(self, model: nn.Module, mirrors: Mapping[str, str], hosts: Mapping[str, nn.Module]) -> None:
        modules = {plain_name(name): module for name, module in model.named_modules()}
        layers = {name: host for host in hosts for name in mirrored_layers(mirrors, host) if name in modules}
        self._pairs = {name: (modules[name], hosts[host]) for name, host in layers.items()}
        for layer, _ in self._pairs.values():
            if "dendrites" not in layer._modules:
                hang(layer)
        self.follow()

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return list(self._pairs)

    def leave_alone(self, host: nn.Module) -> None:
        """Let the layers that mirror one have no dendrites, as that one has none any more."""
        for name, (layer, source) in list(self._pairs.items()):
            if source is host:
                take_off(layer)
                del self._pairs[name]

    def follow(self) -> None:
        """Give each layer the dendrites that the one mirrored has and it lacks, and dendrites their flags.

        So it is after every change: growth, and a load, which makes dendrites of mirrors as any others.
        """
        for layer, source in self._pairs.values():
            own, other = dendrites_of(layer), dendrites_of(source)
            if own.forms != other.forms:
                know_neurons(layer, other.kind.neurons or 0)
                own.follow(layer, other)
            for block, source_block in zip(own.shared, other.shared, strict=True):
                block.see_as(source_block)
            trained = {id(parameter) for parameter in _trained(layer, own)}
            for parameter in own.parameters():
                parameter.requires_grad_(id(parameter) in trained)

    def trained_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """What may be trained of their dendrites, each with the weight of its layer."""
        for layer, _ in self._pairs.values():
            for parameter in _trained(layer, dendrites_of(layer)):
                yield parameter, max(own_parameters(layer).values(), key=Tensor.dim, default=parameter)


def _trained(layer: nn.Module, dendrites: Dendrites) -> list[nn.Parameter]:
    trainable = any(parameter.requires_grad for parameter in own_parameters(layer).values())
    return dendrites.trained_parameters() if trainable else []
