"""Make a checkpoint fit to be given away: the weights and what is needed to use them, and nothing else.

python tools/publish_model.py work_dirs/a/epoch_35.pth model.pth

A checkpoint on the way holds the optimizer, the message hub (logged scalars), the seed, the whole config with its paths, the host's
time and git state. Kept are the weights, the joints' names and colours, and the privacy statement that lies beside.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from cli import run

import mmpose_dp
from mmpose_dp.privacy import PrivacyError

STATEMENT = 'privacy_statement.json'


def published(checkpoint: dict, statement: dict | None) -> dict:
    """What may be given away. Raises PrivacyError for a checkpoint that is not private."""
    if 'state_dict' not in checkpoint:
        raise PrivacyError('the checkpoint has no state_dict: nothing to publish')
    privacy = checkpoint.get('privacy') or {}
    if privacy.get('marking'):
        raise PrivacyError(f'the checkpoint is {privacy["marking"]}')
    if statement is not None and not statement.get('private'):
        raise PrivacyError(f'{STATEMENT} beside the checkpoint says that the training was not private')
    meta = dict(dataset_meta=checkpoint.get('meta', {}).get('dataset_meta'), mmpose_dp_version=mmpose_dp.__version__)
    weights = {name: value.clone() for name, value in checkpoint['state_dict'].items()}
    return dict(state_dict=weights, meta=meta, privacy_statement=statement)


def main() -> None:
    """Reads, strips, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args()
    if not args.checkpoint.is_file():
        raise PrivacyError(f'{args.checkpoint}: there is no such checkpoint')
    beside = args.checkpoint.with_name(STATEMENT)
    statement = json.loads(beside.read_text()) if beside.is_file() else None
    checkpoint = torch.load(args.checkpoint, map_location='cpu', weights_only=False)
    torch.save(published(checkpoint, statement), args.out)
    print(f'{args.out}: {"with its privacy statement" if statement else f"no {STATEMENT} lay beside the checkpoint"}')


if __name__ == '__main__':
    sys.exit(run(main))
