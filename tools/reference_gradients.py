"""Gradients of a few samples as private training computes them, and how far they are from those of plain MMPose.

Not a tool itself. The reference is a loop over single samples by plain autograd. Must not train anything.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import Compose
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS, TRANSFORMS
from torch import nn

from mmpose_dp.datasets import collate_samples
from mmpose_dp.datasets.resolving import is_kind, resolved
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.optim_wrappers.dp_optim_wrapper import all_finite
from mmpose_dp.messages import failure
from mmpose_dp.models import FeatureMaskingHead
from mmpose_dp.privacy.errors import PrivacyError

TOLERANCE = 1e-4  # relative deviation of a parameter's gradient in float64: a larger one is a wrong rule, not rounding


def records(settings: dict, dataset: Any, count: int) -> dict:
    """``count`` samples from the training pipeline: the first usable ones of the data set, or random pictures with random joints.

    Raises PrivacyError if the pipeline rejects all.
    """
    samples: list[dict] = []
    failed = ''
    if dataset is not None:
        for i in range(len(dataset)):
            try:
                sample = dataset.prepare_data(i) if len(samples) < count else None
            except Exception as error:  # as in training, such a sample contributes nothing
                sample, failed = None, f': {failure(error, 300)}'
            samples += [] if sample is None else [sample]
    else:
        rng = np.random.default_rng(0)
        meta = parse_pose_metainfo(settings.get('metainfo') or resolved(DATASETS, settings['type']).METAINFO)
        steps = settings['pipeline']
        pipeline = Compose([s for s in steps if not is_kind(TRANSFORMS, s, LoadImageFromFile)])
        try:
            made = [pipeline(_random_person(rng, meta)) for _ in range(count)]
        except KeyError as error:
            raise PrivacyError(
                f'train_dataloader.dataset: the pipeline needs {error}, which only annotations of this data set have, so it '
                'cannot be tried on random people: run this where the data set is'
            ) from error
        samples = [sample for sample in made if sample is not None]
    if not samples:
        raise PrivacyError(
            f'train_dataloader.dataset: the pipeline rejects every sample, so there is nothing to train on{failed}'
        )
    return collate_samples([samples])


def _random_person(rng: np.random.Generator, meta: dict) -> dict:
    joints, side = meta['num_keypoints'], 256
    return dict(
        copy.deepcopy(meta),
        img=rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
        img_shape=(side, side),
        ori_shape=(side, side),
        img_path='random',
        id=0,
        img_id=0,
        category_id=1,
        bbox=np.array([[24, 24, 232, 232]], dtype=np.float32),
        bbox_score=np.ones(1, dtype=np.float32),
        keypoints=rng.uniform(40, 216, (1, joints, 2)).astype(np.float32),
        keypoints_visible=np.ones((1, joints), dtype=np.float32),
    )


def plain_class(head: type) -> type:
    """MMPose's own class of a private head, behind what is mixed into it."""
    return next(
        kind for kind in head.__mro__ if issubclass(kind, nn.Module) and not issubclass(kind, FeatureMaskingHead)
    )


def compare(model: nn.Module, wrapper: DPOptimWrapper, batch: dict) -> tuple[dict[str, float], int]:
    """Largest deviation of each parameter's gradients over the records, relative to the reference. In float64.

    Also, how many of the records were left out, since their gradient is finite neither here nor in plain MMPose.
    """
    model.double()
    for module in model.modules():
        if 'Drop' in type(module).__name__:
            module.eval()  # or no two forwards are the same
    for sample in batch['data_samples']:
        sample.set_metainfo({'dp_record': None})  # a sample by itself, whose gradient may be compared
        for part in (sample.gt_instance_labels, sample.get('gt_fields')):
            for key, value in part.items() if part is not None else ():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    part.set_field(value.double(), key)
    wrapper.prepare(model)
    plain = copy.deepcopy(model)
    plain.head.__class__ = plain_class(type(plain.head))
    # MMPose's accuracy is no part of the loss, and fails for heads of three channels per joint (UDP's offsets)
    plain.train_cfg = {**(getattr(plain, 'train_cfg', None) or {}), 'compute_acc': False}
    params = [p for p in plain.parameters() if p.requires_grad]
    ours = wrapper.public_gradients(batch)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    order = {id(p): i for i, p in enumerate(wrapper.params)}
    places = [order[id(p)] for p in model.parameters() if p.requires_grad]
    gaps, left_out = dict.fromkeys(names, 0.0), 0
    for index in range(len(batch['inputs'])):
        alone = plain.data_preprocessor({key: [values[index]] for key, values in batch.items()}, True)
        losses = plain(**alone, mode='loss')
        total = sum(value.sum() for key, value in losses.items() if 'loss' in key)
        grads = torch.autograd.grad(total, params, allow_unused=True)
        found = [grad for grad in grads if grad is not None]
        if not all_finite(found) and not all_finite([ours[place][index] for place in places]):
            left_out += 1
            continue
        size = float(torch.stack([g.norm() for g in found]).norm())
        for name, place, grad in zip(names, places, grads):
            want = torch.zeros_like(ours[place][index]) if grad is None else grad
            scale = max(float(want.norm()), 1e-3 * size)  # of a gradient near zero only rounding is left
            gap = float((ours[place][index].double() - want).norm())
            # a sample without a usable joint has no gradient
            gap = gap / scale if scale else gap
            gaps[name] = max(gaps[name], math.inf if math.isnan(gap) else gap)
    return gaps, left_out
