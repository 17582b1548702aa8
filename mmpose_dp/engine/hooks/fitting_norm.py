"""Says before training if ``max_grad_norm`` is longer than gradients are: its noise is then larger than it needs to be.

Must not see a private record, which the norms would tell of. Gradients are those of pictures of noise with joints at random
places: on real people these had 0.6 to 4 times the median norm of people (docs/accuracy_people.md, "The clipping norm"). The
coordinates of a projector that scales them are those of public samples.
"""

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from mmengine.runner import Runner
from mmpose.datasets.transforms import GenerateTarget, PackPoseInputs

from mmpose_dp.datasets import batches_of, collate_samples
from mmpose_dp.datasets.nested import nested, with_inner
from mmpose_dp.extras.clipping_variants import STABILITY, AutomaticMechanism
from mmpose_dp.models import unwrapped
from mmpose_dp.privacy.mechanism import GaussianMechanism

from .preflight import first_usable, untouched_training

_SAMPLES = 5
_PUBLIC_SAMPLES = 16
_TOO_LONG = 1.5  # C, in units of the median norm, above which it is warned of
_ADVISED = 0.1  # C, in the same units: noise can have longer gradients than people, and a shorter C costs nothing


def unfitting_norms(runner: Runner) -> list[str]:
    """A warning if clipping hardly shortens a gradient of the weights that are loaded; empty if it does, or C moves by itself."""
    wrapper, dataset = runner.optim_wrapper, runner.train_dataloader.dataset
    if not _keeps_its_norm(wrapper.mechanism) or _scales(wrapper.mechanism):
        return []
    with untouched_training(runner):
        unwrapped(runner.model).train()
        packed = first_usable(dataset, range(len(dataset.private)))
        batches = [] if packed is None else noise_with_joints(packed, dataset.private)
        norms = []
        for batch in batches:
            with suppress(Exception):  # so may a loss of other code
                norms += wrapper.norms_alone(batch)
    what = f'gradients of {_SAMPLES} pictures of noise, with joints at random places,'
    return _warning(what, norms, wrapper)


def unfitting_coordinates(runner: Runner, chosen: Sequence[int]) -> list[str]:
    """The same for a projector that scales coordinates and has a basis: by those of the first of the ``chosen`` public samples."""
    wrapper, loader = runner.optim_wrapper, runner.train_dataloader
    if not _keeps_its_norm(wrapper.mechanism) or not _scales(wrapper.mechanism):
        return []
    norms = []
    with untouched_training(runner), torch.enable_grad():
        for batch in batches_of(loader.dataset, chosen[:_PUBLIC_SAMPLES], 1):
            gradient = [grads[0] for grads in wrapper.public_gradients(batch)]
            norms.append(float(wrapper.projector.coordinates_of(gradient).norm()))
    return _warning('coordinates of gradients of public samples', norms, wrapper)


def _keeps_its_norm(mechanism: GaussianMechanism) -> bool:
    """Whether one clipping norm applies to whole records and does not move by itself."""
    return type(mechanism) in (GaussianMechanism, AutomaticMechanism)


def _scales(mechanism: GaussianMechanism) -> bool:
    """Whether coordinates are clipped that may be longer than gradients: others are at most as long."""
    return mechanism.coordinates_of is not None and mechanism.coordinates_of.preconditioned


def noise_with_joints(packed: dict, dataset: Any, count: int = _SAMPLES) -> Iterator[dict]:
    """Collated batches of one sample each, with noise for pictures and the data set's own targets for joints at random places.

    Args:
        packed: a sample, of which the form alone is taken.
        dataset: whose pipeline makes targets. Without MMPose's transforms for it nothing is made.
        count: how many batches.
    """
    steps = [step for part in with_inner(dataset) for step in nested(getattr(part, 'pipeline', ()))]
    encoders = [step for step in steps if isinstance(step, GenerateTarget)]
    packers = [step for step in steps if isinstance(step, PackPoseInputs)]
    weights = packed['data_samples'].get('gt_instance_labels', {}).get('keypoint_weights')
    if not encoders or not packers or weights is None:
        return
    height, width = packed['inputs'].shape[-2:]
    joints = weights.shape[-1]
    for _ in range(count):
        points = (np.random.rand(1, joints, 2) * (width, height)).astype(np.float32)
        results = dict(
            img=np.random.randint(0, 256, (height, width, 3), np.uint8),
            keypoints=points,
            transformed_keypoints=points,
            keypoints_visible=np.ones((1, joints), np.float32),
            dataset_keypoint_weights=np.ones(joints, np.float32),
        )
        with suppress(Exception):  # a codec may want what only a person has
            made = packers[-1].transform(encoders[-1].transform(results))
            yield collate_samples([[_like(packed, made)]])


def _like(packed: dict, made: dict) -> dict:
    """The packed sample with another picture, other labels, and the picture's size for every number of its person and box."""
    copied, labels = copy.deepcopy(packed), made['data_samples']
    copied['inputs'] = made['inputs'].to(packed['inputs'].dtype)
    sample, shape = copied['data_samples'], tuple(packed['inputs'].shape[-2:])
    size = float(shape[1])
    known = dict(img_path='', id=-1, img_id=-1, img_shape=shape, ori_shape=shape)
    numbers = {key: _filled(value, size) for key, value in sample.metainfo.items() if not key.startswith('dp_')}
    sample.set_metainfo({key: known.get(key, value) for key, value in numbers.items()})
    for key, value in sample.get('gt_instances', {}).items():
        sample.gt_instances.set_field(_filled(value, size), key)
    for name in ('gt_instance_labels', 'gt_fields'):
        if name in labels:
            setattr(sample, name, getattr(labels, name))
    return copied


def _filled(value: Any, number: float) -> Any:
    """The same form, with ``number`` in the place of every number that is not whole; nothing of an annotation's dict."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, number) if value.is_floating_point() else value
    if isinstance(value, np.ndarray):
        return np.full_like(value, number) if value.dtype.kind == 'f' else value
    return {} if isinstance(value, dict) else number if isinstance(value, float) else value


def _warning(what: str, norms: Sequence[float], wrapper: Any) -> list[str]:
    """The warning if C does not fit the median of these norms, in a list; ``what`` says whose they are."""
    # models that are mixed with equal ones have no gradient
    usable = [norm for norm in norms if 0 < norm < math.inf]
    if not usable:
        return []
    norm, longest = statistics.median(usable), wrapper.mechanism.max_grad_norm
    measured, advised = f'{what} have a median norm of {norm:.2g}', f'{_ADVISED * norm:.1g}'
    if isinstance(wrapper.mechanism, AutomaticMechanism):
        if norm >= STABILITY:
            return []
        return [
            f"optim_wrapper.clipping='automatic': {measured}, so a record weighs norm / (norm + {STABILITY}) of max_grad_norm, "
            f"which is {norm / (norm + STABILITY):.1g} of it, and the noise is made for all of it. Write clipping='flat' and "
            f'max_grad_norm={advised}'
        ]
    if longest <= _TOO_LONG * norm:
        return []
    shorter = f'{longest / float(advised):.2g}'
    public = f' Divide public_weight by {shorter} too.' if wrapper.public_weight else ''
    return [
        f'optim_wrapper.max_grad_norm={longest:g}: {measured}, so few records are clipped, and the noise, which is made '
        f'for max_grad_norm, is about {longest / norm:.2g} times as large as it needs to be. Write max_grad_norm={advised}, which '
        f"clips nearly every record, or clipping='adaptive'. Adam's learning rate can stay; multiply that of SGD by {shorter}, "
        f'which leaves the noise in the weights as it is.{public}'.removesuffix('.')
    ]
