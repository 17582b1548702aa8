"""What may be logged of a step. Must not let through a number of private samples unless the user asked for that."""

import torch
from torch import Tensor

from mmpose_dp.privacy.records import Samples
from mmpose_dp.tensors import of_samples


class StepMetrics:
    """Gathers the metrics of one logical step over its micro-batches.

    Attributes:
        exposed: whether those of private samples are let through, outside the guarantee.
    """

    def __init__(self) -> None:
        self.exposed = False
        self._seen: dict[str, list[Tensor]] = {}

    def note(self, losses: Tensor, samples: Samples, accuracies: dict[str, Tensor]) -> None:
        """Takes the losses, (samples,), and other metrics by name, (samples,), of a micro-batch."""
        if len(samples.public):
            self._seen.setdefault('loss_public', []).append(of_samples(losses, samples.public))
        for name, values in {'loss': losses, **accuracies}.items() if self.exposed and len(samples.private) else ():
            private = of_samples(values, samples.private).to(losses.device)
            self._seen.setdefault(f'{name}_private', []).append(private)

    def take(self) -> dict[str, Tensor]:
        """The means of the step's metrics, each of shape (), which are then forgotten."""
        means = {name: torch.cat(values).mean().float() for name, values in self._seen.items()}
        self._seen = {}
        return means
