"""Write what can be published of a training: the weights and what is needed to use and to check them, and nothing else.

python tools/publish_model.py work_dirs/a/epoch_35.pth my_model [--overwrite]       # a folder
python tools/publish_model.py work_dirs/a/epoch_35.pth my_model.pth [--overwrite]   # one file

A training's checkpoint holds the optimizer, the message hub (logged scalars), the seed, the whole config with its paths, and the
time and git state of the host. This tool keeps the weights, the joints' names and colours, and the checkpoint's own privacy
statement: what had been spent when it was written, and what the trainings before it had published. The file loads with
torch.load(..., weights_only=True), and python -m mmpose_dp.verify checks it.

A folder has that file with its hash in the name, the statement, a report on it, a config that runs in MMPose without mmpose_dp, a
model card, the weights as safetensors, and the network as ONNX, which onnxruntime compares with torch. If one of these packages is
not installed, the tool says what is missing. The statement has the hashes of these files.
"""

import argparse
import hashlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cli import refuse_no_checkpoint, run

import mmpose_dp  # before MMPose: checks and repairs the install

# isort: split
import make_report
from published_folder import (
    CARD_NAME,
    CONFIG_NAME,
    ONNX_NAME,
    Exported,
    built,
    inference_config,
    input_size,
    model_card,
    onnx_of,
    own_modules,
    pipeline_fault,
    plain_model,
    safetensors_of,
)

from mmpose_dp.engine.checks.own_state import own_state
from mmpose_dp.engine.hooks.provenance import kept_lineage
from mmpose_dp.engine.view_audit import with_audit
from mmpose_dp.extras.accountability import with_membership_audit
from mmpose_dp.extras.checkpoint_file import CheckpointFile, plain_values, without_updates
from mmpose_dp.extras.evidence import STATEMENT_NAME, file_sha256, intact_statement, is_checkpoint_of, plain_sha256
from mmpose_dp.extras.statement_page import complete, write_statement
from mmpose_dp.messages import reason
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME

_JOINTS = {  # as mmpose.datasets.datasets.utils.parse_pose_metainfo makes them of a file in configs/_base_/datasets
    *('dataset_name', 'num_keypoints', 'keypoint_id2name', 'keypoint_name2id', 'upper_body_ids', 'lower_body_ids'),
    *('flip_indices', 'flip_pairs', 'keypoint_colors', 'num_skeleton_links', 'skeleton_links', 'skeleton_link_colors'),
    *('dataset_keypoint_weights', 'sigmas', 'stats_info'),
}


def published(checkpoint: dict, folder: Path | None = None) -> dict:
    """What may be published, with the audit of the public view that is in ``folder``, the checkpoint's.

    Raises PrivacyError for a checkpoint that is not private.
    """
    if 'state_dict' not in checkpoint:
        raise PrivacyError(
            'the checkpoint has no state_dict, so there is nothing to publish: give one that tools/train.py wrote'
        )
    if 'privacy' not in checkpoint:
        raise PrivacyError(
            "the checkpoint has no 'privacy' key: it was not made by a private training, or was published already. Give one "
            'that tools/train.py wrote with PrivacyBudgetHook'
        )
    privacy = checkpoint['privacy']
    if privacy.get('marking'):
        raise PrivacyError(f'the checkpoint is {privacy["marking"]}')
    if not privacy.get('statement'):
        raise PrivacyError(
            'the checkpoint holds no privacy statement: it was made without a private step, or by an older version of '
            'mmpose_dp. Resume it with this version, for at least one private step, and publish the result'
        )
    meta = dict(
        dataset_meta=_joints_of(checkpoint.get('meta', {}).get('dataset_meta')),
        mmpose_dp_version=mmpose_dp.__version__,
        # what the trainings before it used, for the statement of a training that starts from it
        lineage=kept_lineage(privacy) or None,
    )
    statement = {key: value for key, value in privacy['statement'].items() if key != 'checkpoints'}  # of the others
    if folder is not None:
        statement = with_audit(with_membership_audit(statement, folder), folder)
    # each tensor row by row in a storage of its own: mmpose_dp.verify accepts no other form
    rows, own = torch.contiguous_format, without_updates(checkpoint['state_dict'])
    _refuse_other_state(own, checkpoint)
    weights = {name: value.clone(memory_format=rows) for name, value in own.items()}
    return dict(state_dict=weights, meta=_plain(meta), privacy_statement=_plain(statement))


def _refuse_other_state(weights: dict, checkpoint: dict) -> None:
    """Raises PrivacyError for anything that is no parameter and no buffer of the model: older versions kept it in checkpoints."""
    text = (checkpoint.get('meta') or {}).get('cfg')
    names = weights.keys() if not isinstance(text, str) else own_state(plain_model(text)).keys()
    other = [name for name, value in weights.items() if name not in names or not isinstance(value, torch.Tensor)]
    if other:
        raise PrivacyError(
            f'the checkpoint holds {other[0]}, which is neither a parameter nor a buffer of its model: it may show private '
            'samples. Resume it with this version of mmpose_dp, for at least one private step, and publish the result'
        )


def _joints_of(known: Any) -> Any:
    """What a data set's meta information says of the joints; the rest may be of the private annotation file (COCO's CLASSES)."""
    return {key: _plain(value) for key, value in known.items() if key in _JOINTS} if isinstance(known, dict) else None


def _plain(value: Any) -> Any:
    """Lists instead of NumPy's arrays, and Python's numbers instead of its: loading them would run code of NumPy."""
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def publish(source: Path, out: Path) -> dict:
    """Writes what may be published of the checkpoint ``source``, completely or not at all, and returns it.

    Raises PrivacyError for a checkpoint that is not private.
    """
    checkpoint, sha256 = _loaded(source)
    given = _with_origin(published(checkpoint, source.parent), source, sha256)
    _save(given, out)
    return given


def origin_of(source: Path, sha256: str | None = None) -> str:
    """Whether the statement beside a checkpoint has its hash, in words. Raises PrivacyError for one that was changed since."""
    same = is_checkpoint_of(intact_statement(source.parent), source, sha256)
    if same is None:
        return (
            f'{source.name}: no statement beside it has its hash, so whether it was changed after training is not known'
        )
    if not same:
        raise PrivacyError(
            f'{source} is not the file that training wrote: {STATEMENT_NAME} beside it has another SHA-256. Put the original back'
        )
    return f'{source.name} is as {STATEMENT_NAME} beside it says'


def _loaded(source: Path) -> tuple[dict, str]:
    """The checkpoint and its SHA-256, computed once: a file may have gigabytes."""
    sha256 = file_sha256(source)
    origin_of(source, sha256)
    return torch.load(source, map_location='cpu', weights_only=False), sha256


def _with_origin(given: dict, source: Path, sha256: str, **more: Any) -> dict:
    """With the hashes of the checkpoint, its weights and ``meta``, and ``more``, in the statement."""
    statement = given['privacy_statement']
    if 'schema_version' not in statement:
        return given
    try:
        statement = dict(
            statement,
            checkpoint=dict(file=source.name, sha256=sha256),
            weights_sha256=CheckpointFile.read(source).weights_sha256,
            meta_sha256=plain_sha256(given['meta']),
            **more,
        )
    except ValueError as error:
        raise PrivacyError(f'{source}: {error}') from error
    return dict(given, privacy_statement=complete(statement))


def _save(given: dict, out: Path) -> None:
    partial = out.with_name(f'{out.name}.partial')
    torch.save(given, partial)
    partial.replace(out)


def publish_folder(source: Path, out: Path) -> tuple[dict, list[str]]:
    """Writes a folder of what may be published of ``source``, completely or not at all; returns its content and what it lacks.

    Raises PrivacyError for a checkpoint that is not private, or whose model plain MMPose cannot run.
    """
    checkpoint, sha256 = _loaded(source)
    given = published(checkpoint, source.parent)
    text = (checkpoint.get('meta') or {}).get('cfg')
    if 'schema_version' not in given['privacy_statement'] or not isinstance(text, str):
        raise PrivacyError(
            f'{source}: an older mmpose_dp wrote it, so it has no config or no full statement: publish one file, OUT.pth'
        )
    cfg = inference_config(text)
    files, exported, lacking = _other_files(cfg, given['state_dict'], out.name)
    if fault := pipeline_fault(cfg, given['meta']['dataset_meta'] or {}):
        lacking.append(
            f'no {CONFIG_NAME} that reads a picture without annotations ({fault}): publish one file, OUT.pth, and write a config '
            'without that step'
        )
    lacking += [f'no code of {one}, which {CONFIG_NAME} imports: give it away too' for one in own_modules(cfg)]
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    given = _with_origin(given, source, sha256, published_files=hashes)
    folder = out.with_name(f'{out.name}.partial')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    _save(given, folder / 'weights.pth')
    weights = f'{out.name}-{file_sha256(folder / "weights.pth")[:8]}.pth'  # as MMPose and torch.hub name files
    (folder / 'weights.pth').rename(folder / weights)
    write_statement(given['privacy_statement'], folder)
    make_report.report(folder)
    names = sorted([CARD_NAME, *(path.name for path in folder.iterdir())])
    joints = len((given['meta']['dataset_meta'] or {}).get('keypoint_id2name') or ()) or 'unnamed'
    card = model_card(out.name, cfg, given['privacy_statement'], joints, names, exported)
    (folder / CARD_NAME).write_text(card, encoding='utf-8')
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
    return given, lacking


def _other_files(cfg: Any, weights: dict, name: str) -> tuple[dict[str, bytes], Exported | None, list[str]]:
    """The files whose hashes the statement has, by name; the network in ONNX; and what could not be made, in words."""
    model = built(cfg, weights)
    files, exported, lacking = {CONFIG_NAME: cfg.pretty_text.encode()}, None, []
    if find_spec('safetensors') is None:
        lacking.append('no safetensors file: pip install safetensors')
    else:
        files[f'{name}.safetensors'] = safetensors_of(weights)
    if find_spec('onnx') is None:
        lacking.append('no ONNX file: pip install onnx onnxruntime')
    else:
        try:
            exported = onnx_of(model, input_size(cfg))
            files[ONNX_NAME] = exported.data
            if exported.difference is None:
                lacking.append(f'{ONNX_NAME} was not compared with torch: pip install onnxruntime')
        except Exception as error:  # torch.onnx raises errors of many kinds for what it cannot export
            lacking.append(f'no ONNX file: {reason(error)[:300]}')
    return files, exported, lacking


def _refuse_existing(out: Path, source: Path, overwrite: bool) -> None:
    """Raises PrivacyError for a name that is taken, unless ``overwrite`` and it was published before."""
    if not out.parent.is_dir():
        raise PrivacyError(f'{out}: there is no folder {out.parent}')
    if not out.exists():
        return
    if out.suffix == '.pth':
        before = out.is_file() and 'privacy_statement' in plain_values(out)
    else:  # a work dir may have a README.md too
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        before = {STATEMENT_NAME, CARD_NAME, CONFIG_NAME} <= names and LEDGER_NAME not in names
    if not overwrite or not before or out.resolve() in source.resolve().parents:
        raise PrivacyError(f'{out} exists: give another name, or --overwrite to replace what was published before')


def main() -> None:
    """Reads, strips, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='checkpoint of a private training, such as epoch_35.pth')
    parser.add_argument('out', type=Path, help='folder to write, or one file (.pth), which can be published')
    parser.add_argument('--overwrite', action='store_true', help='replace what was published before')
    args = parser.parse_args()
    refuse_no_checkpoint(args.checkpoint)
    if args.out.suffix in ('.pt', '.safetensors', '.onnx'):
        raise PrivacyError(
            f'{args.out}: give the name of a folder, which has such files in it, or of one file that ends in .pth'
        )
    _refuse_existing(args.out, args.checkpoint, args.overwrite)
    if args.out.suffix == '.pth':
        given, lacking = publish(args.checkpoint, args.out), []
    else:
        given, lacking = publish_folder(args.checkpoint, args.out)
    statement = given['privacy_statement']
    print(f'{args.out}: {statement["guarantee"]} after {statement["steps"]} steps')
    sha256 = (statement.get('checkpoint') or {}).get('sha256')
    for one in [origin_of(args.checkpoint, sha256), *lacking]:
        print(one)


if __name__ == '__main__':
    sys.exit(run(main))
