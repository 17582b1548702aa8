"""Write a checkpoint that can be published: the weights and what is needed to use them, and nothing else.

python tools/publish_model.py work_dirs/a/epoch_35.pth model.pth [--overwrite]

A training's checkpoint holds the optimizer, the message hub (logged scalars), the seed, the whole config with its paths, and the
time and git state of the host. This tool keeps the weights, the joints' names and colours, and the checkpoint's own privacy
statement: what had been spent when it was written, and what the trainings before it had published. The file loads with
torch.load(..., weights_only=True), and python -m mmpose_dp.verify checks it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cli import refuse_no_checkpoint, run

import mmpose_dp
from mmpose_dp.engine.view_audit import with_audit
from mmpose_dp.extras.accountability import with_membership_audit
from mmpose_dp.extras.checkpoint_file import CheckpointFile
from mmpose_dp.extras.evidence import file_sha256
from mmpose_dp.extras.statement_page import complete
from mmpose_dp.privacy.errors import PrivacyError


def published(checkpoint: dict, folder: Path | None = None) -> dict:
    """What may be published, with the audit of the public view that is in ``folder``, the checkpoint's.

    Raises PrivacyError for a checkpoint that is not private.
    """
    if 'state_dict' not in checkpoint:
        raise PrivacyError('the checkpoint has no state_dict: nothing to publish')
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
        dataset_meta=_plain(checkpoint.get('meta', {}).get('dataset_meta')),
        mmpose_dp_version=mmpose_dp.__version__,
        descent=privacy.get(
            'descent'
        ),  # what the trainings before it used, for the statement of a training that starts from it
    )
    statement = privacy['statement']
    if folder is not None:
        statement = with_audit(with_membership_audit(statement, folder), folder)
    weights = {name: value.clone() for name, value in checkpoint['state_dict'].items()}
    return dict(state_dict=weights, meta=meta, privacy_statement=statement)


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
    given = published(torch.load(source, map_location='cpu', weights_only=False), source.parent)
    statement = given['privacy_statement']
    if 'schema_version' in statement:
        try:
            origin = dict(file=source.name, sha256=file_sha256(source))
            statement = dict(statement, checkpoint=origin, weights_sha256=CheckpointFile.read(source).weights_sha256)
        except ValueError as error:
            raise PrivacyError(f'{source}: {error}') from error
        given['privacy_statement'] = complete(statement)
    partial = out.with_name(f'{out.name}.partial')
    torch.save(given, partial)
    partial.replace(out)
    return given


def main() -> None:
    """Reads, strips, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='checkpoint of a private training, such as epoch_35.pth')
    parser.add_argument('out', type=Path, help='file to write, which can be published')
    parser.add_argument('--overwrite', action='store_true', help='replace a file that exists')
    args = parser.parse_args()
    refuse_no_checkpoint(args.checkpoint)
    if args.out.exists() and (not args.overwrite or args.out.samefile(args.checkpoint) or not args.out.is_file()):
        raise PrivacyError(
            f'{args.out} exists: give another name, or --overwrite to replace a file that was published before'
        )
    if not args.out.parent.is_dir():
        raise PrivacyError(f'{args.out}: there is no folder {args.out.parent}')
    given = publish(args.checkpoint, args.out)
    print(f'{args.out}: {given["privacy_statement"]["guarantee"]} after {given["privacy_statement"]["steps"]} steps')


if __name__ == '__main__':
    sys.exit(run(main))
