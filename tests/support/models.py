"""Real MMPose models and packed samples for tests, and the reference: plain MMPose, one record at a time, plain autograd."""

import copy
from pathlib import Path

import mmpose
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

PREFIX = 'mmpose::body_2d_keypoint/'
HRNET = PREFIX + 'topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'
SIMCC = PREFIX + 'simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py'
RLE = PREFIX + 'topdown_regression/mpii/td-reg_res50_rle-8xb64-210e_mpii-256x256.py'
RTMPOSE = PREFIX + 'rtmpose/mpii/rtmpose-m_8xb64-210e_mpii-256x256.py'
FOLDER = Path(mmpose.__file__).parent / '.mim/configs'
SIZES = ('input_size', 'heatmap_size', 'in_featuremap_size', 'img_size', 'out_shape')


def load(name: str, size: int | None = None) -> Config:
    """A config of MMPose without pretrained weights; ``size``: the new height of its images, whose proportions stay."""
    cfg = Config.fromfile(FOLDER / name.removeprefix('mmpose::'))
    cfg.model.backbone.init_cfg = None
    if size is not None:
        codec = cfg.codec[0] if isinstance(cfg.codec, list) else cfg.codec
        old = codec.input_size[1]
        for part in (cfg.codec, cfg.model, cfg.train_dataloader.dataset, cfg.train_pipeline):
            _scale(part, lambda pixels: int(pixels * size / old))
    cfg.train_dataloader.dataset.pipeline = cfg.train_pipeline
    return cfg


def small_hrnet() -> Config:
    """HRNet with layers of all its kinds, but a fifth as many and a quarter as wide, for 64 x 64 pixels."""
    cfg = load(HRNET, size=64)
    for stage in cfg.model.backbone.extra.values():
        stage.num_modules, stage.num_blocks = 1, (1,) * len(stage.num_blocks)
        if stage.block == 'BASIC':
            stage.num_channels = tuple(channels // 4 for channels in stage.num_channels)
    cfg.model.head.in_channels //= 4
    return cfg


def _scale(node, scale) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in SIZES and isinstance(value, (tuple, list)):
                node[key] = tuple(map(scale, value))
            elif key in SIZES and isinstance(value, int):
                node[key] = scale(value)
            else:
                _scale(value, scale)
    elif isinstance(node, list):
        for value in node:
            _scale(value, scale)


def build(cfg: Config, private: bool, loss_weight: float | None = None) -> torch.nn.Module:
    """The model in train mode with frozen BatchNorm, with MMPose's own head or with its private twin.

    In float64: in float32, a single ReLU whose input changes sign with the batch size makes a difference of 1e-5 on some
    machines. What is computed from the captured tensors is in float32 nevertheless.
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
    """A collated batch as PackPoseInputs makes it; ``keys`` are the samples' dp_record (None: public)."""
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
    """Runs a logical batch as PrivateTrainLoop does: private and public samples apart, one record at a time if it must."""
    records = by_record(data)
    is_public = [part['data_samples'][0].metainfo.get('dp_record', 0) is None for part in records]
    split = [[record for record, public in zip(records, is_public) if public == wanted] for wanted in (False, True)]
    micro_batches = [{key: sum((record[key] for record in part), []) for key in data} for part in split if part]
    if wrapper._model is None:  # as before training
        wrapper.prepare(getattr(model, 'module', model))
        wrapper.rehearse(micro_batches[0])
    parts = records if wrapper.engine.one_at_a_time else micro_batches
    for i, part in enumerate(parts):
        wrapper.accumulating = i + 1 < len(parts)
        model.train_step(part, wrapper)


def reference_gradients(model: torch.nn.Module, data: dict) -> torch.Tensor:
    """(samples, p) gradients: plain MMPose model, one sample at a time, plain autograd."""
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for image, sample in zip(data['inputs'], data['data_samples']):
        one = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), True)
        losses = model(**one, mode='loss')
        grads = torch.autograd.grad(sum(v.sum() for k, v in losses.items() if 'loss' in k), params, allow_unused=True)
        gradients.append(
            torch.cat([torch.zeros(p.numel()) if g is None else g.flatten().float() for p, g in zip(params, grads)])
        )
    return torch.stack(gradients)


def flat(tensors) -> torch.Tensor:
    """Joins tensors into one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def clip(gradients: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """(samples, p) clipped by the definition, in float64: float32 norms of 28 million numbers are off by 1e-3."""
    return (gradients * (clipping_norm(max_grad_norm) / norms(gradients)).clamp_max(1)[:, None]).float()


def norms(gradients: torch.Tensor) -> torch.Tensor:
    """(samples, p) -> (samples,) float64."""
    return torch.stack([gradient.double().norm() for gradient in gradients])
