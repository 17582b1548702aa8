"""Data sets, samplers and transforms of private training. Must not import the engine."""

from .collate import batches_of, by_record, collate_samples
from .overlap import refuse_private_metrics, refuse_private_validation
from .public_private_dataset import PublicPrivateDataset
from .samplers import PoissonBatchSampler
from .transforms import PublicView, View

__all__ = [
    'PoissonBatchSampler',
    'PublicPrivateDataset',
    'PublicView',
    'View',
    'batches_of',
    'by_record',
    'collate_samples',
    'refuse_private_metrics',
    'refuse_private_validation',
]
