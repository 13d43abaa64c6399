"""One correlation phase under a Trainer: the network stands still, the candidates learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from pl_dendrites.core.growth.sharded import reshard
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.rule.processes import JointLearning
from pl_dendrites.training.processes import Processes
from pl_dendrites.training.stand_still import StandStill
from pl_dendrites.training.trainer import gradient_scaler

__all__ = ["CorrelationPhase", "adam"]


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of candidates where the user names none: Adam with learning rate 0.01.

    A pool has several times the parameters of its layer, so its step is worth the fused kernel: on a CPU it takes a
    fourth of the time.

    Args:
        parameters: of the candidates.
    """
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr=0.01, fused=all(p.device.type in ("cpu", "cuda") for p in parameters))


class CorrelationPhase:
    """Starts candidates, steps them with an optimizer of their own, and puts the Trainer back afterwards.

    Args:
        trainer: the Trainer, in the middle of a fit.
        network: the network that grows.
        pool: candidates per neuron.
        seed: for the candidates' initial weights.
        batches: steps of the model's optimizer in whose place the candidates take one, with all their gradients; the
            last batch of an epoch leaves none for the next.
        optimizer: makes their optimizer; ``None``: Adam with learning rate 0.01.
        validate: whether the Trainer goes on to validate.
        resumed: a :meth:`state_dict` to go on from; ``None``: a new phase.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        network: DendriticNetwork,
        *,
        pool: int,
        seed: int,
        batches: int = 1,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        validate: bool = True,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        reshard(network.model)
        # A generator of its own: the user's random numbers stay what they are without dendrites.
        network.start_candidates(
            pool,
            torch.Generator().manual_seed(seed),
            trainable=None if resumed is None else resumed["trainable"],
            state=None if resumed is None else resumed["candidates"],
        )
        self._network, self._make_optimizer = network, adam if optimizer is None else optimizer
        try:
            self._take_parameters()
            if resumed is not None:
                self._optimizer.load_state_dict(resumed["optimizer"])
        except BaseException:
            network.discard()
            raise
        self._stand_still = StandStill(trainer, validate)
        self._processes = Processes(trainer)
        self._joint: JointLearning | None = None
        if self._processes.count > 1:
            pools, all_of_them = network.candidates.values(), self._processes
            self._joint = JointLearning(pools, all_of_them.add_up, all_of_them.count, all_of_them.gather)
        self._backward_seen = False
        self._batches, self._waiting = batches, 0
        self._manual = not trainer.lightning_module.automatic_optimization

    def _take_parameters(self) -> None:
        # In float16 the square of a small gradient is zero, and Adam divides by its root: half precision is for the
        # forward pass, and a step is computed in single.
        parameters = self._network.candidate_parameters()
        stepped = [
            p if p.dtype == torch.promote_types(p.dtype, torch.float32) else nn.Parameter(p.detach().float())
            for p in parameters
        ]
        self._half = [(half, single) for half, single in zip(parameters, stepped, strict=True) if half is not single]
        self._single = stepped
        self._optimizer = self._make_optimizer(stepped)

    def keep_strongest(self) -> None:
        """Let candidates see their strongest inputs alone from now on. Their optimizer begins anew."""
        if self._network.keep_strongest():
            self._take_parameters()
        self._network.reset_correlations()

    def rose(self, min_delta: float) -> bool:
        """Whether the best correlation of any neuron rose by a share, in any process.

        Where processes are not alike, what each computes of gathered samples may differ in the last bits.

        Args:
            min_delta: the share.
        """
        return self._processes.any(self._network.correlation_rose(min_delta))

    @property
    def learning_rate(self) -> float:
        """Of the candidates, or the first of them if their optimizer has several."""
        return float(self._optimizer.param_groups[0]["lr"])

    def begin_batch(self) -> None:
        """Forget steps since the last batch: saving a sharded model may step an optimizer, to see what it remembers."""
        self._stand_still.stepped = False

    def begin_backward(self) -> None:
        """Let the error be seen by those layers alone whose weights this backward pass would train."""
        toggled = self._stand_still.toggled
        parameters = None if toggled is None else [p for group in toggled.param_groups for p in group["params"]]
        self._network.watch(parameters)

    def end_backward(self) -> None:
        """Learn from what this backward pass showed to all processes together."""
        self._backward_seen = True
        if self._joint is not None:
            self._joint.learn()

    def end_batch(self, trainer: pl.Trainer) -> None:
        """Step the candidates if the model's optimizer would have stepped in this batch."""
        self.hold_still()
        if self._joint is not None and not self._backward_seen:
            self._joint.learn()  # a model under manual optimization may call `loss.backward()` past Lightning
        self._backward_seen = False
        self._waiting += self._stepped()
        if self._waiting < (1 if trainer.is_last_batch else self._batches):
            return
        self._waiting = 0
        if self._joint is not None:
            self._joint.add_up_gradients()
        self._to_single()
        gradients = [p.grad for p in self._single if p.grad is not None]
        scaler = gradient_scaler(trainer)
        if scaler is None or not gradients:
            for gradient in gradients:
                # An error that is not finite counts as none, but none times an input that is not finite is NaN.
                gradient.nan_to_num_(0.0, 0.0, 0.0)
            self._optimizer.step()
        else:
            self._step_scaled(scaler)
        self._optimizer.zero_grad()
        self._to_half()

    @torch.no_grad()
    def _to_single(self) -> None:
        for half, single in self._half:
            single.copy_(half)
            single.grad, half.grad = None if half.grad is None else half.grad.float(), None

    @torch.no_grad()
    def _to_half(self) -> None:
        for half, single in self._half:
            half.copy_(single)

    def _stepped(self) -> bool:
        # A model that steps its optimizers itself may pass one over in one process and not in another.
        stepped, self._stand_still.stepped = self._stand_still.stepped, False
        return self._processes.any(stepped) if self._manual else stepped

    def _step_scaled(self, scaler: torch.amp.GradScaler) -> None:
        # The scaler belongs to this optimizer now: a scale that overflows must come down here as in a base phase.
        scaler.unscale_(self._optimizer)
        if self._network.missed_error():
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        else:
            scaler.step(self._optimizer)
            scaler.update()

    def end(self) -> None:
        """Give the Trainer back its optimizers; candidates that nobody integrated go."""
        self._stand_still.release()
        self._network.discard()

    def hold_still(self) -> None:
        """Put back what moves though no optimizer steps: the model's buffers, and schedulers that it steps itself."""
        self._network.hold_still()
        self._stand_still.hold()

    def scheduler_states(self) -> list[dict[str, Any]]:
        """States of the user's schedulers, which stand still."""
        return self._stand_still.scheduler_states()

    def state_dict(self) -> dict[str, Any]:
        """Candidates, their optimizer, and which parameters will be trainable again."""
        return {
            "candidates": self._network.candidate_state(),
            "optimizer": self._optimizer.state_dict(),
            "trainable": self._network.trainable,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned in this phase."""
        self._network.load_candidate_state(state["candidates"])
        self._optimizer.load_state_dict(state["optimizer"])
