"""The form (tensor shapes) that all samples of a data set share, and how a sample differs from it.

The samples of a batch are stacked, so a sample of another form would end the training, and one that is not finite can end the
process on a GPU. Must not read more of a sample than its form and whether it is finite.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE = 'the image'
Form = dict[str, tuple[int, ...]]


def form_of(packed: dict) -> Form:
    """The shapes of a packed sample's image and labels, by name. Raises ValueError if the sample cannot be trained on."""
    image, sample = packed.get('inputs'), packed.get('data_samples')
    if image is None or sample is None:
        raise ValueError('it does not end with PackPoseInputs')
    if not isinstance(image, Tensor) or image.dim() != 3:
        raise ValueError(f'it packs {type(image).__name__} instead of one image (channels, height, width)')
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(
            f"its image has type {image.dtype}: read 8-bit values (LoadImage's color_type='color') or floating-point numbers"
        )
    tensors = dict(_labels(sample), **{IMAGE: image})
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ValueError(f'{bad[0]} holds numbers that are not finite')
    return {name: tuple(value.shape) for name, value in tensors.items()}


def difference(form: Form, other: Form) -> str:
    """How two forms differ, in words; '' if they are equal."""
    for name in [*form, *(other.keys() - form.keys())]:
        if form.get(name) != other.get(name):
            return f'{name} is {_words(other.get(name))} instead of {_words(form.get(name))}'
    return ''


def _words(shape: Sequence[int] | None) -> str:
    return 'missing' if shape is None else 'x'.join(map(str, shape)) or 'one number'


def _labels(sample: Any) -> Iterator[tuple[str, Tensor]]:
    for part in ('gt_instance_labels', 'gt_fields'):
        labels = sample.get(part)
        for name, value in () if labels is None else labels.items():
            for i, one in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                if isinstance(one, Tensor):
                    yield (f'{name}[{i}]' if isinstance(value, (list, tuple)) else name), one
