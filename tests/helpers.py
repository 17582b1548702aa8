"""Real MMPose models and packed samples for tests, and the reference: plain MMPose, one record at a time, plain autograd."""

import copy
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmpose.registry import KEYPOINT_CODECS, MODELS
from mmpose.structures import PoseDataSample

from mmpose_dp.datasets import by_record
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.models import freeze_batch_norm
from mmpose_dp.privacy.clipping import clipping_norm
from mmpose_dp.privacy.errors import OneRecordAtATime

REPO = Path(__file__).parents[1]
PREFIX = 'mmpose::body_2d_keypoint/'
HRNET = PREFIX + 'topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'
SIMCC = PREFIX + 'simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py'
RLE = PREFIX + 'topdown_regression/mpii/td-reg_res50_rle-8xb64-210e_mpii-256x256.py'
RTMPOSE = PREFIX + 'rtmpose/mpii/rtmpose-m_8xb64-210e_mpii-256x256.py'
CODEC = dict(type='MSRAHeatmap', input_size=(64, 64), heatmap_size=(16, 16), sigma=2)
PIPELINE = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='RandomFlip', direction='horizontal'),
    dict(type='RandomBBoxTransform', shift_prob=0),
    dict(type='TopdownAffine', input_size=(64, 64)),
    dict(type='GenerateTarget', encoder=CODEC),
    dict(type='PackPoseInputs'),
]


def mpii(root: Path, split: str = 'train') -> dict:
    """The config of a data set laid out as MPII."""
    return dict(
        type='MpiiDataset',
        data_root=str(root),
        data_mode='topdown',
        ann_file=f'annotations/mpii_{split}.json',
        data_prefix=dict(img='images/'),
        pipeline=PIPELINE,
    )


def load(base: str, size: int | None = None) -> Config:
    """One of MMPose's configs without pretrained weights, optionally at another input size."""
    cfg = Config.fromfile(_inherit(base))
    cfg.model.backbone.init_cfg = None
    if size is not None:
        old, cfg.codec.input_size = cfg.codec.input_size[0], (size, size)
        if 'heatmap_size' in cfg.codec:
            cfg.codec.heatmap_size = (cfg.codec.heatmap_size[0] * size // old,) * 2
        head = cfg.model.head
        for name in {'input_size', 'in_featuremap_size'} & head.keys():
            head[name] = (head[name][0] * size // old,) * 2
    return cfg


def _inherit(base: str) -> Path:
    import mmpose

    return Path(mmpose.__file__).parent / '.mim/configs' / base.removeprefix('mmpose::')


def build(cfg: Config, private: bool, loss_weight: float | None = None) -> torch.nn.Module:
    """The model in train mode with frozen BatchNorm, with MMPose's own head or with its private twin.

    In float64: in float32 one ReLU that another batch size tips over its kink is a difference of 1e-5 by itself, on some
    machines. What is computed from the captured tensors is in float32 all the same.
    """
    torch.manual_seed(0)
    model_cfg = copy.deepcopy(cfg.model)
    if private:
        model_cfg.head.type = f'Private{model_cfg.head.type}'
    if loss_weight is not None:
        model_cfg.head.loss.loss_weight = loss_weight
    model = MODELS.build(model_cfg)
    freeze_batch_norm(model)
    for module in model.modules():  # statistics as a trained model has them, not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    model.double().train()
    for module in model.modules():
        if 'Drop' in type(module).__name__:
            module.eval()  # or no two forwards are the same
    return model


def batch(cfg: Config, keys: list, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """A collated batch as PackPoseInputs makes it; ``keys`` are the rows' dp_record (None: public)."""
    rng, codec = np.random.default_rng(seed), KEYPOINT_CODECS.build(cfg.codec)
    width, height = cfg.codec.input_size
    inputs, samples = [], []
    for key in keys:
        keypoints = rng.uniform(0, min(width, height), (1, 16, 2)).astype('float32')
        encoded = codec.encode(keypoints, (rng.random((1, 16)) < 0.9).astype('float32'))
        sample = PoseDataSample(metainfo=dict(dp_record=key))
        sample.gt_instance_labels, sample.gt_fields = InstanceData(), PixelData()
        for name in ('keypoint_weights', 'keypoint_labels', 'keypoint_x_labels', 'keypoint_y_labels'):
            if name in encoded:
                sample.gt_instance_labels.set_field(torch.from_numpy(encoded[name]).to(dtype), name)
        if 'heatmaps' in encoded:
            sample.gt_fields.set_field(torch.from_numpy(encoded['heatmaps']).to(dtype), 'heatmaps')
        inputs.append(torch.from_numpy(rng.integers(0, 255, (3, height, width), dtype=np.uint8)))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def take(model: torch.nn.Module, data: dict, wrapper: DPOptimWrapper) -> None:
    """A logical batch as PrivateTrainLoop hands it on: one half a forward, or one record where the engine needs that."""
    records = by_record(data)
    is_public = [part['data_samples'][0].metainfo.get('dp_record', 0) is None for part in records]
    halves = [[part for part, public in zip(records, is_public) if public == half] for half in (False, True)]
    halves = [{key: sum((part[key] for part in half), []) for key in data} for half in halves if half]
    for parts in (halves, records):
        try:
            for i, part in enumerate(parts):
                wrapper.accumulating = i + 1 < len(parts)
                model.train_step(part, wrapper)
            return
        except OneRecordAtATime:
            continue


def reference_gradients(model: torch.nn.Module, data: dict) -> torch.Tensor:
    """(rows, p) gradients: plain MMPose model, a batch of one record at a time, plain autograd."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for image, sample in zip(data['inputs'], data['data_samples']):
        one = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), True)
        losses = model(**one, mode='loss')
        grads = torch.autograd.grad(sum(v.sum() for k, v in losses.items() if 'loss' in k), params, allow_unused=True)
        rows.append(
            torch.cat([torch.zeros(p.numel()) if g is None else g.flatten().float() for p, g in zip(params, grads)])
        )
    return torch.stack(rows)


def flat(tensors) -> torch.Tensor:
    """Joins tensors to one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def clip(rows: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """The clipping of the definition, with room for rounding; float64, as float32 norms of 28 million numbers are off by 1e-3."""
    return (rows * (clipping_norm(max_grad_norm) / norms(rows)).clamp_max(1)[:, None]).float()


def norms(rows: torch.Tensor) -> torch.Tensor:
    """(rows, p) -> (rows,) float64."""
    return torch.stack([row.double().norm() for row in rows])
