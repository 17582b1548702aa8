"""Runs one batch through preprocessor, backbone, head and loss, so that parts that do not fit are named before training.

Must not show values: the batch is noise, and messages hold shapes only.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmpose_dp.datasets import collate_samples
from mmpose_dp.messages import failure, owner_in_words
from mmpose_dp.models import FeatureMaskingHead
from mmpose_dp.models.heads.private_head import labels_in, tensors_in
from mmpose_dp.privacy.errors import ConfigError, PrivacyError, UnsupportedModelError
from mmpose_dp.tensors import at_least_float32

from .checks.replay import prepared


def blank_batch(packed: dict, count: int = 1) -> dict:
    """A batch of ``count`` samples like the packed one, with noise in the place of pictures and targets."""
    return collate_samples([[_blank(packed)] for _ in range(count)])


def _blank(packed: dict) -> dict:
    packed = copy.deepcopy(packed)
    image = packed['inputs']
    packed['inputs'] = torch.randint(0, 256, image.shape).to(image.dtype)
    for value in labels_in(packed['data_samples']):
        value.uniform_(0, 1) if value.is_floating_point() else value.fill_(1)  # a weight of 0 would leave no loss
    return packed


def try_batch(model: nn.Module, batch: dict, key: str, amp_dtype: torch.dtype | None = None) -> None:
    """Runs a training forward without gradients.

    The head's loss is the plain one, which private training takes sample by sample.

    Args:
        model: the model, made private.
        batch: a collated batch.
        key: the config key of the data, for messages.
        amp_dtype: of mixed precision; None: full precision.

    Raises:
        ConfigError: if a part of the model does not fit the data; the message names it.
        UnsupportedModelError: if the head computes its loss without calling its own forward, or the model has other losses too.
    """
    head = next(m for m in model.modules() if isinstance(m, FeatureMaskingHead))
    labels = batch['data_samples'][0].get('gt_instance_labels')
    _check_joints(head, labels, key)
    targets = {name: tuple(x.shape) for name, x in _targets(batch['data_samples'][0]).items()}
    device, preprocessor = next(model.parameters()).device.type, model.get_submodule('data_preprocessor')
    amp = torch.autocast(device, dtype=amp_dtype) if amp_dtype else nullcontext()
    with _traced(model, head) as seen, torch.no_grad(), amp, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.filterwarnings('error', message='Using a target size')  # torch would broadcast one to the other
        try:
            ready = preprocessor(batch, True)
            finite = all(bool(x.isfinite().all()) for x in tensors_in(ready['inputs']))
            losses = model(**ready, mode='loss')
        except Exception as error:
            _check_decoder(head, batch, key)  # then the pictures are of another size than all parts are for
            words = f'{failure(error, 300)}{owner_in_words(error, nn.Module)}'
            raise ConfigError(f'{_what_failed(seen, key, targets)}: {words}') from error
    if not finite:
        raise ConfigError(
            f'model.data_preprocessor makes numbers that are not finite of the images of {key}, so that no record would teach '
            'anything: write a std above 0 for each channel'
        )
    if 'head' not in seen:
        raise UnsupportedModelError(
            'model.head.loss does not call self.forward(feats), so it has no per-record losses: let it compare the '
            'output of self.forward(feats) with the data samples'
        )
    _refuse_other_losses(losses, seen)
    _check_decoder(head, batch, key)


def _refuse_other_losses(losses: dict, seen: dict) -> None:
    """Refuses a model that trains on something else than the losses of its head, which private training takes by sample."""
    added = [name for name in losses if 'loss' in name and name not in seen['losses']]
    if added:
        raise UnsupportedModelError(
            f'the model adds {", ".join(added)} to the losses of model.head, and private training needs one loss per sample, from '
            'the head alone: move it into the head, whose loss may use what its forward(feats) returns'
        )
    for name, value in seen['losses'].items():
        if 'loss' in name and not (isinstance(value, Tensor) and value.numel() == 1):
            given = f'{value.numel()} numbers' if isinstance(value, Tensor) else f'a {type(value).__name__}'
            raise UnsupportedModelError(
                f'model.head gives {name} as {given} and must give one number: average or add it in the loss of the head'
            )


def rehearse(wrapper: Any, batch: dict, key: str) -> None:
    """The per-sample gradients of a blank batch of several samples, compared with autograd's. Raises PrivacyError.

    Args:
        wrapper: a DPOptimWrapper.
        batch: of blank samples.
        key: of the config, where they come from.
    """
    try:
        wrapper.rehearse(batch)
    except PrivacyError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f'the model does not train on two samples of {key}: {failure(error, 300)}'
        ) from error


def refuse_loss_of_unseen_joints(wrapper: Any, packed: dict, key: str) -> None:
    """Raises ConfigError if a joint that is not visible makes the gradient of a sample NaN or infinite.

    Such a sample teaches nothing, and in most data sets nearly every sample has one: a budget would be spent for nothing. Two
    blank samples are compared, so nothing of a record is seen.

    Args:
        wrapper: a DPOptimWrapper.
        packed: a packed sample, for the form of the blank ones.
        key: of the config, where it comes from.
    """
    batch = blank_batch(packed, 2)
    labels = batch['data_samples'][1].get('gt_instance_labels')
    weights = None if labels is None else labels.get('keypoint_weights')
    if not isinstance(weights, Tensor) or not weights.numel():
        return
    weights[..., 0] = 0
    if [math.isfinite(norm) for norm in wrapper.norms_alone(batch)] == [True, False]:
        raise ConfigError(
            f'the loss of model.head has no finite gradient for a sample of {key} in which a joint is not visible '
            '(keypoint_weights of 0). It has none in plain MMPose either, and such a sample would teach nothing: write a loss that '
            'leaves these joints out. For JSDiscretLoss write use_target_weight=False: the target of such a joint is empty, which '
            'gives the joint no gradient'
        )


def refuse_early_mixing(model: nn.Module, batch: dict, key: str) -> None:
    """Raises UnsupportedModelError if the data preprocessor or the first layer changes a sample when others are beside it.

    From the first layer on, gradients at the layers show whether samples mix. Before it, only the gradients of parameters do, in
    the replay, and these hardly depend on the picture if the last layer begins near zero. The replay also tests what is random.
    """
    with torch.no_grad():
        seen = [_before_layers(model, {name: values[:count] for name, values in batch.items()}) for count in (1, 1, 3)]
    for (place, alone), (_, again), (_, among) in zip(*seen):
        same_form = isinstance(among, Tensor) and alone.shape[1:] == among.shape[1:]
        if not same_form or not torch.equal(alone, again):
            return
        if not torch.allclose(alone[0], among[0], rtol=1e-3, atol=1e-3 * float(alone.abs().max()), equal_nan=True):
            raise UnsupportedModelError(
                f'{place} gives a sample of {key} another output among others than alone, so records mix there or before it: let '
                'it treat each sample by itself'
            )


def _before_layers(model: nn.Module, batch: dict) -> list[tuple[str, Any]]:
    """What comes out of the data preprocessor, and out of the first layer that gives pictures, each with its name."""
    ready = prepared(model, batch)
    seen: list[tuple[str, Any]] = [('model.data_preprocessor', ready['inputs'])]

    def keep(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                seen.append((f'model.{name}', output.clone()))
                raise _Seen

        return look

    leaves = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
    handles = [module.register_forward_hook(keep(name)) for name, module in leaves]
    try:
        with suppress(_Seen):
            model(**ready, mode='loss')
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Seen(BaseException):
    """Ends a forward of which no more is needed. It is no Exception, which a model may catch."""


def _check_joints(head: nn.Module, labels: Any, key: str) -> None:
    """Refuses a head with another number of joints, even if broadcasting would make its loss run."""
    weights = None if labels is None else labels.get('keypoint_weights')
    if not isinstance(weights, Tensor) or not weights.dim():
        return
    joints = weights.shape[-1]
    for name in ('out_channels', 'num_joints'):
        own = getattr(head, name, None)
        if type(own) is int and own not in (joints, 3 * joints):  # three maps per joint: UDP's combined targets
            advice = f'write {name}={joints}'
            if key.endswith('.public'):  # the private part, which comes first, fits
                advice = (
                    f'give public data with the {own} joints of the private set (KeypointConverter in its pipeline)'
                )
            raise ConfigError(f'model.head.{name}={own} does not fit the {joints} joints of {key}: {advice}')


def _check_decoder(head: nn.Module, batch: dict, key: str) -> None:
    size = getattr(getattr(head, 'decoder', None), 'input_size', None)
    height, width = batch['inputs'][0].shape[-2:]
    if size is not None and tuple(int(x) for x in size) != (width, height):
        raise ConfigError(
            f'model.head.decoder.input_size={tuple(size)} does not fit the images of {key}, which are {(width, height)} (width, '
            'height), so predictions would have another scale: use one codec for both, and TopdownAffine with its input_size in '
            'the pipeline'
        )


@contextmanager
def _traced(model: nn.Module, head: nn.Module) -> Iterator[dict]:
    """Inside, the output shapes of the model's parts are recorded, and the head has the plain loss of its parent class."""
    seen: dict[str, Any] = {}

    def forward(feats: Any) -> Any:
        seen['feats'] = _shapes(feats)
        outputs = plain_forward(feats)
        seen['head'] = _shapes(outputs)
        # as the private head gives them to its loss in mixed precision
        return tree_map_only(Tensor, at_least_float32, outputs)

    def loss(feats: Any, batch_data_samples: list, train_cfg: dict | None = None) -> dict:
        seen.setdefault('feats', _shapes(feats))
        found = plain_loss(feats, batch_data_samples, dict(train_cfg or {}, compute_acc=False))
        seen['losses'] = found
        return found

    def note(name: str) -> Any:
        return lambda module, inputs, outputs: seen.update({name: _shapes(outputs)})

    plain_forward, plain_loss = head.forward, super(FeatureMaskingHead, head).loss  # type: ignore[misc]
    parts = [(name, getattr(model, name, None)) for name in ('data_preprocessor', 'backbone', 'neck')]
    handles = [part.register_forward_hook(note(name)) for name, part in parts if isinstance(part, nn.Module)]
    vars(head).update(forward=forward, loss=loss)
    try:
        yield seen
    finally:
        del vars(head)['forward'], vars(head)['loss']
        for handle in handles:
            handle.remove()


def _what_failed(seen: dict, key: str, targets: dict) -> str:
    if 'data_preprocessor' not in seen:
        return f'model.data_preprocessor does not take the images of {key}'
    if 'backbone' not in seen:
        return f'model.backbone does not take the images of {key}'
    if 'feats' not in seen:
        return f'model.neck (or the model between backbone and head) does not take the output of model.backbone, {seen["backbone"]}'
    if 'head' not in seen:
        return (
            f'model.head does not take the output of the backbone, {seen["feats"]} (samples, channels, height, width): change its '
            'in_channels, input_size and in_featuremap_size to fit'
        )
    return (
        f'model.head gives {seen["head"]} but {key} has the targets {targets or "none"}: change model.head (out_channels, '
        'deconv_out_channels, input_size, simcc_split_ratio, loss) or the codec in GenerateTarget so that they fit'
    )


def _targets(sample: Any) -> dict[str, Tensor]:
    parts = (sample.get('gt_fields'), sample.get('gt_instance_labels'))
    return {name: x for part in parts if part is not None for name, x in part.items() if isinstance(x, Tensor)}


def _shapes(value: Any) -> str:
    """The shapes of every tensor, in words."""
    return ', '.join(str(tuple(x.shape)) for x in tensors_in(value))
