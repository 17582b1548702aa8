"""What may be logged of a step. Must not let through a number of private samples unless the user asked for that."""

import torch
from torch import Tensor

from mmpose_dp.privacy.records import Samples


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
        public = (samples.records < 0).to(losses.device)
        self._seen.setdefault('loss_public', []).append(losses[public])
        if self.exposed:
            for name, values in {'loss': losses, **accuracies}.items():
                self._seen.setdefault(f'{name}_private', []).append(values.to(public.device)[~public])

    def take(self) -> dict[str, float]:
        """The means of the step's metrics, which are then forgotten."""
        joined = {name: torch.cat(values) for name, values in self._seen.items()}
        self._seen = {}
        return {name: float(values.mean()) for name, values in joined.items() if len(values)}
