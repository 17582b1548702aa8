"""Runs one method on one model for performance.py. Must not compare or print anything.

Each method has its own process, so that its peak memory can be measured; the parent lets them take turns.
"""

import copy
import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmpose.registry import KEYPOINT_CODECS, MODELS, TRANSFORMS
from mmpose.utils import register_all_modules
from performance_peers import PEERS
from torch import nn
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.basis import GradientTable, fit_basis
from mmpose_dp.extras.kronecker import PASSES, KroneckerProjector
from mmpose_dp.models import freeze_batch_norm
from mmpose_dp.privacy.projection import Projector

PLAIN, BASIS, KRONECKER_BASIS = 'plain', 'finding a basis', 'finding Kronecker coordinates'
KRONECKER = 'kronecker'
PROJECTED = {order: dict(projector=order) for order in ('project-then-clip', 'noise-then-project')}
METHODS: dict[str, dict] = {  # the most important first: a run may be interrupted
    PLAIN: {},
    'dpsgd': {},
    'hybrid': dict(public_weight=1.0, projector='project-then-clip'),
    **{name: {} for name in PEERS},
    'dpsgd, loop over records': dict(engine='loop'),  # takes one sample at a time
    **{f'projected, {order}': settings for order, settings in PROJECTED.items()},
    'projected, Kronecker coordinates': dict(projector=KRONECKER),
    'feature': dict(public_weight=1.0),
    'dpsgd, bfloat16': dict(amp_dtype='bfloat16'),
}
BASES = BASIS, KRONECKER_BASIS
TURN = 64  # images of a long batch before the plain step has its turn again


def turns_of(method: str, batch: int) -> int:
    """How many turns one step of a method takes."""
    return 1 if method in (PLAIN, *BASES, *PEERS) else max(1, batch // TURN)


def make_batch(cfg: Config, count: int, public: int) -> dict:
    """``count`` random images with targets from the config's codec; the last ``public`` of them are public."""
    encoder = next(s['encoder'] for s in cfg.train_dataloader.dataset.private.pipeline if s['type'] == 'GenerateTarget')
    codec = KEYPOINT_CODECS.build(encoder)
    generator = torch.Generator().manual_seed(0)
    width, height = encoder['input_size']
    pack = TRANSFORMS.build(dict(type='PackPoseInputs', meta_keys=()))
    joints = cfg.model.head.out_channels
    inputs, samples = [], []
    for index in range(count):
        points = torch.rand(1, joints, 2, generator=generator).numpy() * [width, height]
        encoded = codec.encode(points.astype('float32'), torch.ones(1, joints).numpy())
        names = {k: getattr(codec, k) for k in ('label_mapping_table', 'field_mapping_table') if getattr(codec, k)}
        sample = pack(dict(encoded, **names, img=torch.zeros(1, 1, 3).numpy()))['data_samples']
        sample.set_metainfo(dict(dp_record=None if index >= count - public else index))
        samples.append(sample)
        inputs.append(torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8))
    return dict(inputs=inputs, data_samples=samples)


def make_step(
    cfg: Config, method: str, samples: int, expected_batch_size: int, rank: int, device: str, turns: int
) -> tuple[Callable[[], Iterator[None]], Callable[[], Iterator[None]]]:
    """A method's first training step and every later one, turn by turn, on a copy of the model.

    A batch repeats the same ``samples`` random images. The first step, in which a private method checks its engine, has few.
    """
    torch.manual_seed(0)
    settings = dict(METHODS.get(method, {}))
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None
    if method == PLAIN:
        model_cfg.head.type = model_cfg.head.type.removeprefix('Private')
    model = MODELS.build(model_cfg).to(device).train()
    public = samples if method in BASES else samples // 2 if 'public_weight' in settings else 0
    batch = make_batch(cfg, samples, public)
    if method in PEERS:
        return _in_one_turn(PEERS[method](model, batch, expected_batch_size // samples))
    freeze_batch_norm(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(params, lr=1e-4)
    if method == PLAIN:
        plain = OptimWrapper(optimizer)
        return _in_one_turn(lambda: model.train_step(batch, plain))
    order = settings.pop('projector', None)
    wrapper = DPOptimWrapper(
        optimizer,
        max_grad_norm=0.1,
        noise_multiplier=1.0,
        expected_batch_size=expected_batch_size,
        projector=projector_of(order, rank, params),
        **settings,
    )
    if method in BASES:
        wrapper.prepare(model)
        return _in_one_turn(lambda: new_basis(method, wrapper, rank, batch, expected_batch_size))
    parts = [slice(samples - public), slice(samples - public, samples)] if public else [slice(samples)]
    if settings.get('engine') == 'loop':
        parts = [slice(i, i + 1) for i in range(samples)]
    # in the order of PoissonBatchSampler: all private ones first
    parts = [part for part in parts for _ in range(expected_batch_size // samples)]
    micro_batches = [{key: values[part] for key, values in batch.items()} for part in parts]

    def step(micro_batches: list[dict], turns: int) -> Iterator[None]:
        for i, micro_batch in enumerate(micro_batches, 1):
            wrapper.accumulating = i < len(micro_batches)
            model.train_step(micro_batch, wrapper)
            if not i % (len(micro_batches) // turns):
                yield

    return lambda: step([micro_batches[0], micro_batches[-1]], 1), lambda: step(micro_batches, turns)


def _in_one_turn(step: Callable[[], Any]) -> tuple[Callable[[], Iterator[None]], Callable[[], Iterator[None]]]:
    """A method whose first step is like any other, and whose step is one turn."""

    def turns() -> Iterator[None]:
        step()
        yield

    return turns, turns


def new_basis(method: str, wrapper: DPOptimWrapper, rank: int, batch: dict, records: int) -> None:
    """As ProjectorRefreshHook, from so many records, which repeat those of the batch."""
    samples = len(batch['inputs'])
    if method == KRONECKER_BASIS:
        turns = [range(records // samples // PASSES)] * PASSES
        KroneckerProjector().fit(wrapper.params, [(wrapper.public_gradients(batch) for _ in turn) for turn in turns])
        return
    projector = Projector(rank=rank, preconditioned=True, dtype='bfloat16')
    table = GradientTable(wrapper.params, records, projector.dtype)
    for _ in range(records // samples):
        wrapper.public_gradients(batch, table.next_rows(samples))
    fit_basis(projector, table)


def projector_of(order: str | None, rank: int, params: list[nn.Parameter]) -> Projector | None:
    """The projector of a method, with a basis of random directions: it costs as much as a fitted one."""
    if order is None:
        return None
    if order == KRONECKER:
        kronecker = KroneckerProjector()
        kronecker.fit(params, [[[torch.randn(1, *p.shape) for p in params]]] * PASSES)
        return kronecker
    projector = Projector(rank=rank, order=order, dtype='bfloat16')
    total = sum(p.numel() for p in params)
    flat = torch.randn(rank, total, dtype=torch.bfloat16, device=params[0].device).div_(total**0.5)
    projector.place(flat, [p.shape for p in params])
    return projector


class Memory:
    """Peak memory beyond what the process held before the model was made, in bytes."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != 'cpu'
        self._before = 0 if self._on_gpu else self._resident('VmRSS')

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path('/proc/self/status').read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    def reset(self) -> int:
        """Forgets the peak so far and frees what is unused."""
        gc.collect()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL('libc.so.6').malloc_trim(0)
            Path('/proc/self/clear_refs').write_text('5')  # resets the high-water mark
        return 0

    def peak(self) -> int:
        """The peak since the last ``reset``."""
        return torch.cuda.max_memory_allocated() if self._on_gpu else self._resident('VmHWM') - self._before


def serve(pipe: Connection, job: dict, method: str, process: int, meeting: str) -> None:
    """Answers 'time' with the seconds of a step's next turn (see ``turns_of``), and 'reset' and 'peak' as ``Memory`` does.

    A failure is answered with its text and ends the process.

    Args:
        job: what performance.py measures: config, samples, expected_batch_size, rank, device, threads, processes.
        process: index of this process among those that share the batch.
        meeting: the file by which they find each other; it must not exist.
    """
    torch.set_num_threads(job['threads'])
    register_all_modules()
    device = job['device']
    shares = job['processes'] if method == job['method'] else 1  # the plain step runs in one process
    try:
        if shares > 1:
            torch.distributed.init_process_group('gloo', f'file://{meeting}', rank=process, world_size=shares)
        memory = Memory(device)
        batch = job['expected_batch_size']
        sizes = (job['samples'], batch // shares, job['rank'])
        first, step = make_step(Config.fromfile(job['config']), method, *sizes, device, turns_of(method, batch))
        list(first())
        gc.freeze()  # as PrivateTrainLoop does
        turns = chain.from_iterable(iter(step, None))  # the turns of one step after the other, without end
        while request := pipe.recv():
            if request != 'time':
                pipe.send(memory.peak() if request == 'peak' else memory.reset())
                continue
            start = time.perf_counter()
            next(turns)
            if device != 'cpu':
                torch.cuda.synchronize()
            pipe.send(time.perf_counter() - start)
    except Exception as error:  # whatever a peer raises for a model
        pipe.send(f'{type(error).__name__}: {error}')
