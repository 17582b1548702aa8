"""The parts of a folder that tools/publish_model.py writes: MMPose's config, safetensors, ONNX, and the model card.

Not a tool itself. All of it follows from the released weights, the statement, and the settings of the model. Must not write a path,
a name or a figure of the training's data, and must not write a file that does not compute what the checkpoint does.
"""

import copy
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmpose.datasets.transforms import KeypointConverter
from mmpose.registry import DATASETS, KEYPOINT_CODECS, MODELS, TRANSFORMS
from mmpose.utils import register_all_modules

from mmpose_dp.datasets.resolving import every_dict, is_kind, resolved
from mmpose_dp.extras.risk import risk_in_words
from mmpose_dp.extras.statement_page import guessed
from mmpose_dp.messages import failure, step_in_words
from mmpose_dp.privacy.errors import PrivacyError

CONFIG_NAME, ONNX_NAME, CARD_NAME = 'config.py', 'model.onnx', 'README.md'
SIMCC = ('simcc_x', 'simcc_y')  # as MMDeploy names them; rtmlib takes them in this order
_REGISTRIES = (MODELS, TRANSFORMS, KEYPOINT_CODECS, DATASETS)
_TOLERANCE = 1e-4  # of onnxruntime's outputs, relative to the largest of torch's
_OURS = 'mmpose_dp'
_MMPOSES = ('mmpose', 'mmdet', 'mmpretrain', 'mmcv', 'mmengine', 'torch', 'torchvision')  # what whoever has MMPose has


# ---- the config --------------------------------------------------------------------------------------------------------
def inference_config(text: str) -> Config:
    """What MMPose needs to run a model, of a private training's config: the model, its codec and the pipeline of its test set.

    Raises PrivacyError if it cannot run without mmpose_dp.
    """
    whole = Config.fromstring(text, '.py')
    test = _innermost((whole.get('test_dataloader') or whole.get('val_dataloader') or {}).get('dataset') or {})
    pipeline = test.get('pipeline') or whole.get('val_pipeline')
    if not pipeline:
        raise PrivacyError(
            'the config has no test_dataloader.dataset.pipeline, by which MMPose reads a picture: publish one file, OUT.pth'
        )
    # it converts annotated joints, of which a picture to run the model on has none
    pipeline = [step for step in pipeline if not is_kind(TRANSFORMS, step, KeypointConverter)]
    model = copy.deepcopy(whole.model.to_dict())
    model.setdefault('data_preprocessor', whole.get('preprocess_cfg'))
    for key in ('train_cfg', 'init_cfg', 'pretrained'):
        model.pop(key, None)
    imports = whole.get('custom_imports') or {}
    modules = imports.get('imports', [])
    others = [one for one in ([modules] if isinstance(modules, str) else modules) if one.partition('.')[0] != _OURS]
    cfg = dict(
        default_scope=whole.get('default_scope') or 'mmpose',
        dataset_type=_mmposes_dataset(whole.get('dataset_type') or test.get('type') or 'CocoDataset'),
        data_mode=test.get('data_mode', 'topdown'),
        codec=copy.deepcopy(whole.get('codec')),
        model=_without_weights(model),
        test_dataloader=dict(dataset=dict(pipeline=copy.deepcopy(pipeline))),
        visualizer=dict(type='PoseLocalVisualizer', name='visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )
    for key, value in cfg.items():
        _refuse_ours(value, key)
    if all(_top(kind) in _MMPOSES for kind in _classes(cfg)):  # what is imported for training alone
        others = [one for one in others if one.partition('.')[0] in _MMPOSES]
    if others:
        cfg['custom_imports'] = dict(imports=others, allow_failed_imports=False)
    return Config(cfg)


def pipeline_fault(cfg: Config, joints: dict[str, Any]) -> str:
    """Why the pipeline of an inference config cannot read a picture without annotations; empty if it can.

    ``joints``: the meta information of the data set, which MMPose adds to every picture.
    """
    steps = copy.deepcopy(cfg.test_dataloader.dataset.pipeline)
    with tempfile.TemporaryDirectory() as folder:
        picture = f'{folder}/blank.png'
        cv2.imwrite(picture, np.zeros((64, 64, 3), np.uint8))
        box = dict(bbox=np.array([[0, 0, 64, 64]], np.float32), bbox_score=np.ones(1, np.float32))
        try:
            with _silent(), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                Compose(steps)(dict(img_path=picture, **box, **joints))
        except Exception as error:  # a transform can raise anything
            return f'{failure(error, 200)}{step_in_words(error)}'
    return ''


def own_modules(cfg: Config) -> list[str]:
    """The modules of the user's own that an inference config imports, and that MMPose does not bring."""
    modules = (cfg.get('custom_imports') or {}).get('imports', [])
    return [one for one in modules if one.partition('.')[0] not in _MMPOSES]


def _mmposes_dataset(kind: Any) -> str:
    """The name of a data set's class, or of the class of MMPose that it inherits from: by it, MMPose chooses a detector."""
    found = resolved(DATASETS, kind)
    if not isinstance(found, type) or _top(found) in _MMPOSES:
        return _short(kind)
    return next((one.__name__ for one in found.__mro__ if _top(one) in _MMPOSES), 'CocoDataset')


def _top(kind: type) -> str:
    """The package of a class."""
    return kind.__module__.partition('.')[0]


def _classes(node: Any) -> Iterator[type]:
    """The classes that a config names, as far as they are registered here."""
    kinds = [part['type'] for part in every_dict(node) if part.get('type')]
    found = (resolved(registry, kind) for kind in kinds for registry in _REGISTRIES)
    return (one for one in found if isinstance(one, type))


def _innermost(dataset: dict) -> dict:
    """The data set inside those that wrap it."""
    inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
    return dataset if inner is None else _innermost(inner)


def _without_weights(node: Any) -> Any:
    """Without ``init_cfg`` of kind 'Pretrained', which names a file: the weights are in the checkpoint."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if not _is_pretrained(key, value)}
        return {key: _without_weights(value) for key, value in kept.items()}
    return [_without_weights(one) for one in node] if isinstance(node, (list, tuple)) else node


def _is_pretrained(key: str, value: Any) -> bool:
    return key == 'init_cfg' and isinstance(value, dict) and value.get('type') == 'Pretrained'


def _refuse_ours(node: Any, where: str) -> None:
    """Gives MMPose's name to each of its heads. Raises PrivacyError for another class of this project, or for a path."""
    if isinstance(node, dict):
        kind = node.get('type')
        found = (
            [cls for cls in (resolved(registry, kind) for registry in _REGISTRIES) if cls is not None] if kind else []
        )
        if found and getattr(found[0], '__module__', '').partition('.')[0] == _OURS:
            plain = str(kind).rpartition('.')[2].removeprefix('Private')
            if resolved(MODELS, plain) is None or plain == kind:
                raise PrivacyError(
                    f'{where}.type={kind!r} needs mmpose_dp, so plain MMPose cannot run it: publish one file, OUT.pth'
                )
            node['type'] = plain
        for key, value in node.items():
            _refuse_ours(value, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            _refuse_ours(value, f'{where}[{number}]')
    elif isinstance(node, str) and os.path.isabs(node):
        raise PrivacyError(f'{where} is a path on this machine, which others do not have: publish one file, OUT.pth')


def plain_model(text: str) -> torch.nn.Module:
    """The model of a private training's config, with random weights. Raises PrivacyError if it cannot be built here."""
    register_all_modules()
    try:
        cfg = Config.fromstring(text, '.py')
        init_default_scope(cfg.get('default_scope') or 'mmpose')
        return MODELS.build(_without_weights(cfg.model.to_dict()))
    except Exception as error:  # a part of the user's can raise anything
        raise PrivacyError(
            f"the model of the checkpoint's config cannot be built here: {failure(error)}. List the modules that "
            'register its parts in custom_imports'
        ) from error


def built(cfg: Config, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """MMPose's model with the weights. Raises PrivacyError if they do not fit it."""
    register_all_modules()
    init_default_scope(cfg.default_scope)
    model = MODELS.build(copy.deepcopy(cfg.model))
    keys = model.load_state_dict(weights, strict=False)
    wrong = [*keys.missing_keys, *keys.unexpected_keys]
    if wrong:
        raise PrivacyError(
            f"the weights are not those of MMPose's model ({wrong[0]} and {len(wrong) - 1} more): a model that was changed for "
            "private training (norm='group') does not run in plain MMPose. Publish one file, OUT.pth"
        )
    return model.eval()


# ---- other forms of the weights ----------------------------------------------------------------------------------------
class Network(torch.nn.Module):
    """Normalised RGB crops (N, 3, height, width) to what the head gives: two SimCC vectors, heatmaps, or coordinates."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, crops: torch.Tensor) -> Any:
        """What the head gives."""
        return self.model.head.forward(self.model.extract_feat(crops))


@dataclass(frozen=True)
class Exported:
    """An ONNX model: its bytes, the names of its outputs, and the largest difference from torch's, or None if not compared."""

    data: bytes
    outputs: tuple[str, ...]
    difference: float | None


def output_names(outputs: Any) -> tuple[str, ...]:
    """The names of a head's outputs: SimCC's two as rtmlib and MMDeploy expect them."""
    given = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    if len(given) == 2 and all(one.ndim == 3 for one in given):
        return SIMCC
    kind = 'heatmaps' if given[0].ndim == 4 else 'coordinates'
    return tuple(kind if i == 0 else f'{kind}_{i}' for i in range(len(given)))


def onnx_of(model: torch.nn.Module, size: tuple[int, int]) -> Exported:
    """The network in ONNX, for crops of (width, height), any number at once.

    Raises PrivacyError if it computes something else than torch, and whatever torch.onnx raises for what it cannot export.
    """
    network, (width, height) = Network(model).eval(), size
    crops = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network(crops)
    names, file = output_names(wanted), io.BytesIO()
    with _silent(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what tracing may get wrong is compared below
        torch.onnx.export(
            network,
            (crops[:1],),
            file,
            dynamo=False,
            input_names=['input'],
            output_names=list(names),
            dynamic_axes={name: {0: 'batch'} for name in ('input', *names)},
        )
    data = _with_fixed_shapes(file.getvalue(), wanted)
    return Exported(data, names, _difference(data, crops, wanted))


def _with_fixed_shapes(data: bytes, outputs: Any) -> bytes:
    """An ONNX model whose outputs state their shapes, except the batch: torch may name a size after an operation instead."""
    import onnx

    model = onnx.load_from_string(data)
    given = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    for declared, output in zip(model.graph.output, given):
        for axis, size in list(zip(declared.type.tensor_type.shape.dim, output.shape))[1:]:
            axis.dim_value = size
    return model.SerializeToString()


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches the terminal: torch prints the whole graph of a network that it cannot export, from C++."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with open(os.devnull, 'w') as nowhere:
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, old in zip((1, 2), kept):
            os.dup2(old, number)
            os.close(old)


def _difference(data: bytes, crops: torch.Tensor, wanted: Any) -> float | None:
    """The largest difference between onnxruntime's and torch's outputs, relative to torch's largest; None without onnxruntime."""
    if find_spec('onnxruntime') is None:
        return None
    import onnxruntime

    found = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider']).run(None, {'input': crops.numpy()})
    given = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    worst = max(float(np.abs(a - b.numpy()).max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(found, given))
    if not worst < _TOLERANCE:
        raise PrivacyError(f'the ONNX model computes something else than torch: by {worst:.1g} of the largest output')
    return worst


def safetensors_of(weights: dict[str, torch.Tensor]) -> bytes:
    """The weights in the safetensors format, which holds numbers and names alone."""
    from safetensors.torch import save

    return save(
        {name: value.detach().clone().contiguous() for name, value in weights.items()}, metadata={'format': 'pt'}
    )


# ---- the model card ----------------------------------------------------------------------------------------------------
_CARD = """\
# {name}

A top-down 2D pose model ({kind}, {joints} joints), trained with differential privacy.

**{guarantee}**, by {method}. Protected: {protected}.

{risk}

Not protected:

{not_protected}

Pretraining, which is treated as public: {pretraining}.

`privacy_statement.md` has the whole statement, with what it does not cover, and `privacy_report.html` shows it on one page.
`python -m mmpose_dp.verify .` checks it, and that these files belong to it, without MMPose and torch.

## Files

| file | what |
| --- | --- |
{files}

## Use

```python
# {needs}; with mmcv-lite, which lacks compiled operators, write import mmpose_dp above this line
from mmpose.apis import inference_topdown, init_model

model = init_model('{config}', '{checkpoint}', device='cpu')
found = inference_topdown(model, 'picture.jpg', bboxes=[[10, 10, 200, 300]])  # x0, y0, x1, y1 of each person
```
{onnx}"""
_RTMLIB = """
With [rtmlib](https://github.com/Tau-J/rtmlib), without torch. It does not turn OpenCV's BGR into RGB, which this model expects:

```python
import cv2
from rtmlib import RTMPose

model = RTMPose('{file}', model_input_size={size}, mean={mean}, std={std})
keypoints, scores = model(cv2.imread('picture.jpg')[..., ::-1], bboxes=[[10, 10, 200, 300]])
```
"""
_ONNX = """
`{file}` takes crops `input` (batch, 3, {height}, {width}) in {order}, normalised with mean {mean}
and standard deviation {std}, and gives {outputs}.
"""
_WHAT = {
    '.pth': 'weights, joints and statement, for MMPose',
    '.safetensors': 'the same weights, for other programs',
    '.onnx': 'the network, for onnxruntime and others',
    '.py': "MMPose's config",
    '.json': 'the privacy statement, for programs',
    '.md': 'the privacy statement, for people',
    '.html': 'a report on it',
}


def model_card(
    name: str, cfg: Config, statement: dict[str, Any], joints: int, files: list[str], exported: Exported | None
) -> str:
    """A model card in Hugging Face's form: YAML, then Markdown."""
    tags = ['pose-estimation', 'mmpose', 'differential-privacy', *(['onnx'] if exported else [])]
    front = yaml.safe_dump(dict(library_name='mmpose', pipeline_tag='keypoint-detection', tags=tags), sort_keys=False)
    rows = '\n'.join(f'| `{one}` | {_WHAT[Path(one).suffix]} |' for one in files if one != CARD_NAME)
    own = own_modules(cfg)
    return f'---\n{front}---\n' + _CARD.format(
        name=name,
        kind=f'{_short(cfg.model.backbone.type)}, {_short(cfg.model.head.type)}',
        joints=joints,
        guarantee=statement['guarantee'],
        method=statement['method'],
        protected=statement['protected'],
        pretraining=statement['pretraining'],
        not_protected='\n'.join(f'- {one}' for one in statement['not_protected']),
        risk='\n'.join(f'- {one}' for one in risk_in_words(statement['risk'], guessed(statement))),
        files=rows,
        config=CONFIG_NAME,
        needs=' and '.join(['MMPose', *own]) if own else 'MMPose alone',
        checkpoint=next(one for one in files if one.endswith('.pth')),
        onnx='' if exported is None else _onnx_words(cfg, exported),
    )


def _short(kind: Any) -> str:
    return str(kind).rpartition('.')[2]


def _onnx_words(cfg: Config, exported: Exported) -> str:
    """How to feed the ONNX model."""
    pre, codec, (width, height) = cfg.model.data_preprocessor, _codec(cfg), input_size(cfg)
    known = dict(file=ONNX_NAME, mean=tuple(pre.get('mean') or (0, 0, 0)), std=tuple(pre.get('std') or (1, 1, 1)))
    order = 'RGB' if pre.get('bgr_to_rgb') else 'BGR'
    outputs = ', '.join(f'`{one}`' for one in exported.outputs)
    words = _ONNX.format(**known, order=order, width=width, height=height, outputs=outputs)
    # rtmlib divides by 2 whatever the model, and reads no heatmaps
    if exported.outputs == SIMCC and float(codec.get('simcc_split_ratio', 0)) == 2 and order == 'RGB':
        words += _RTMLIB.format(**known, size=(width, height))
    return words


def _codec(cfg: Config) -> dict:
    codec = cfg.codec or cfg.model.head.decoder
    return codec[-1] if isinstance(codec, (list, tuple)) else codec


def input_size(cfg: Config) -> tuple[int, int]:
    """(width, height) of a crop."""
    width, height = _codec(cfg)['input_size']
    return int(width), int(height)
