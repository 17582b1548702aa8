"""Speed of private steps beside the plain step, as ratios measured in the same run.

    python tools/benchmark.py [--config CONFIG ...] [--rows 8] [--steps 5]

Every method takes the same number of images a step (feature and hybrid: half private, half public views). Random images;
methods take turns, so that a slow minute of the machine hits all of them.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import mmpose_dp  # noqa: F401  (first: checks and mends the install)

# isort: split
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmpose.registry import KEYPOINT_CODECS, MODELS, TRANSFORMS
from mmpose.utils import register_all_modules
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.models import freeze_batch_norm
from mmpose_dp.privacy import Projector

CONFIGS = ('configs/dp/hrnet_mpii_hybrid_eps08.py', 'configs/dp/hrnet_synthetic_hybrid_eps08.py')
RANK = 50
PROJECTED = {order: dict(projector=order) for order in ('noise-then-project', 'project-then-clip')}
METHODS: dict[str, dict | None] = {
    'plain': None,
    'dpsgd': dict(),
    'dpsgd, loop over records': dict(engine='loop'),
    **{f'projected ({order})': settings for order, settings in PROJECTED.items()},
    'feature': dict(public_weight=1.0),
    'hybrid': dict(public_weight=1.0, projector='project-then-clip'),
}


def make_batch(cfg: Config, rows: int, public: bool) -> dict:
    """Random images with targets from the config's codec; the second half public if asked for."""
    encoder = next(s['encoder'] for s in cfg.train_dataloader.dataset.private.pipeline if s['type'] == 'GenerateTarget')
    codec = KEYPOINT_CODECS.build(encoder)
    generator = torch.Generator().manual_seed(0)
    width, height = encoder['input_size']
    pack = TRANSFORMS.build(dict(type='PackPoseInputs', meta_keys=()))
    inputs, samples = [], []
    for row in range(rows):
        joints = torch.rand(1, 16, 2, generator=generator).numpy() * [width, height]
        encoded = codec.encode(joints.astype('float32'), torch.ones(1, 16).numpy())
        names = {k: getattr(codec, k) for k in ('label_mapping_table', 'field_mapping_table') if getattr(codec, k)}
        sample = pack(dict(encoded, **names, img=torch.zeros(1, 1, 3).numpy()))['data_samples']
        sample.set_metainfo(dict(dp_record=None if public and row >= rows // 2 else row))
        samples.append(sample)
        inputs.append(torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8))
    return dict(inputs=inputs, data_samples=samples)


def make_step(cfg: Config, settings: dict | None, rows: int, device: str) -> Callable[[], None]:
    """One training step of a method on its own copy of the model."""
    torch.manual_seed(0)
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None
    if settings is None:
        model_cfg.head.type = model_cfg.head.type.removeprefix('Private')
    model = MODELS.build(model_cfg).to(device).train()
    freeze_batch_norm(model)
    params = [p for p in model.parameters() if p.requires_grad]
    batch = make_batch(cfg, rows, public='public_weight' in (settings or {}))
    optimizer = SGD(params, lr=1e-4)
    if settings is None:
        wrapper = OptimWrapper(optimizer)
    else:
        settings = dict(settings)
        order = settings.pop('projector', None)
        wrapper = DPOptimWrapper(
            optimizer,
            max_grad_norm=0.1,
            noise_multiplier=1.0,
            expected_batch_size=rows,
            projector=order and dict(rank=RANK, order=order, dtype='bfloat16'),
            **settings,
        )
        if order:
            wrapper.projector = random_projector(order, params)
    return lambda: model.train_step(batch, wrapper)


def random_projector(order: str, params: list[torch.Tensor]) -> Projector:
    """A basis of random directions: as dear as a fitted one."""
    projector = Projector(rank=RANK, order=order, dtype='bfloat16')
    total = sum(p.numel() for p in params)
    projector.basis = [(torch.randn(RANK, *p.shape) / total**0.5).to(p.device, torch.bfloat16) for p in params]
    return projector


def measure(config: str, rows: int, steps: int, device: str) -> list[tuple[str, float]]:
    """(method, median seconds a step)."""
    cfg = Config.fromfile(config)
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    made = {name: make_step(cfg, settings, rows, device) for name, settings in METHODS.items()}
    for turn in range(steps + 1):
        for name, step in made.items():
            start = time.perf_counter()
            step()
            if device != 'cpu':
                torch.cuda.synchronize()
            if turn:  # the first one warms up and checks the engine
                taken[name].append(time.perf_counter() - start)
    return [(name, median(values)) for name, values in taken.items()]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', nargs='+', default=CONFIGS)
    parser.add_argument('--rows', type=int, default=8, help='images a step, private and public together')
    parser.add_argument('--steps', type=int, default=5, help='timed steps; the median counts')
    args = parser.parse_args()
    register_all_modules()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{name}, torch {torch.__version__}, {args.rows} images a step, rank {RANK}, median of {args.steps} steps\n')
    print('| config | method | seconds | times the plain step |\n| --- | --- | ---: | ---: |')
    for config in args.config:
        results = measure(config, args.rows, args.steps, device)
        for method, seconds in results:
            print(f'| {config} | {method} | {seconds:.3f} | {seconds / results[0][1]:.2f} |', flush=True)


if __name__ == '__main__':
    main()
