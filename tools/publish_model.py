"""Write a checkpoint that can be published: the weights and what is needed to use them, and nothing else.

python tools/publish_model.py work_dirs/a/epoch_35.pth model.pth

A training's checkpoint holds the optimizer, the message hub (logged scalars), the seed, the whole config with its paths, and the
time and git state of the host. This tool keeps the weights, the joints' names and colours, and the checkpoint's own privacy
statement: what had been spent when it was written, and what the trainings before it had published.
"""

import argparse
import sys
from pathlib import Path

import torch
from cli import run

import mmpose_dp
from mmpose_dp.engine.view_audit import with_audit
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
        dataset_meta=checkpoint.get('meta', {}).get('dataset_meta'),
        mmpose_dp_version=mmpose_dp.__version__,
        descent=privacy.get(
            'descent'
        ),  # what the trainings before it used, for the statement of a training that starts from it
    )
    statement = privacy['statement'] if folder is None else with_audit(privacy['statement'], folder)
    weights = {name: value.clone() for name, value in checkpoint['state_dict'].items()}
    return dict(state_dict=weights, meta=meta, privacy_statement=statement)


def main() -> None:
    """Reads, strips, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='checkpoint of a private training, such as epoch_35.pth')
    parser.add_argument('out', type=Path, help='file to write, which can be published')
    args = parser.parse_args()
    if not args.checkpoint.is_file():
        raise PrivacyError(f'{args.checkpoint}: there is no such checkpoint')
    given = published(torch.load(args.checkpoint, map_location='cpu', weights_only=False), args.checkpoint.parent)
    torch.save(given, args.out)
    print(f'{args.out}: {given["privacy_statement"]["guarantee"]} after {given["privacy_statement"]["steps"]} steps')


if __name__ == '__main__':
    sys.exit(run(main))
