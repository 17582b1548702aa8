"""Make a data set in MPII's layout from Leeds Sports Pose (extended or not) or from COCO's people.

    python tools/convert_people.py --lsp FOLDER --out data/people/lspet           # FOLDER has joints.mat and images/
    python tools/convert_people.py --coco person_keypoints_val2017.json --images val2017 --out data/people/coco_val2017

See mmpose_dp.datasets.converting; must not hold logic of its own. Read the licences of the pictures before you publish any.
"""

import argparse
from pathlib import Path

import cli

from mmpose_dp.datasets.converting import coco_people, lsp_people, write_people


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        '--lsp', type=Path, metavar='FOLDER', help='Leeds Sports Pose, extended or not: joints.mat and images/'
    )
    source.add_argument(
        '--coco', type=Path, metavar='FILE', help='keypoints of COCO, such as person_keypoints_val2017.json'
    )
    parser.add_argument(
        '--images', type=Path, metavar='FOLDER', help='COCO: folder of the pictures that its file names'
    )
    parser.add_argument('--out', type=Path, required=True, help='folder to write, laid out as data/mpii')
    parser.add_argument(
        '--least-joints', type=int, help='people with fewer annotated joints are left out (default: LSP 8, COCO 6)'
    )
    parser.add_argument(
        '--longest-side', type=cli.positive, default=112, help='pixels; larger people are reduced to it (default 112)'
    )
    parser.add_argument(
        '--val-share', type=cli.fraction, default=0.2, help='share of people to validate on (default 0.2)'
    )
    parser.add_argument('--seed', type=int, default=0, help='another seed divides the people differently (default 0)')
    parser.add_argument('--force', action='store_true', help='overwrite another data set in --out')
    args = parser.parse_args()
    if args.coco and not args.images:
        parser.error('--coco needs --images: the folder of the pictures that the file names')
    return args


def main() -> None:
    """Reads the arguments and converts."""
    args = parse_args()
    least = {} if args.least_joints is None else dict(least_joints=args.least_joints)
    people = lsp_people(args.lsp, **least) if args.lsp else coco_people(args.coco, args.images, **least)
    train, val = write_people([*people], args.out, args.longest_side, args.val_share, args.seed, args.force)
    print(
        f'{train} + {val} people in {args.out}. Their head size is estimated where the source has none: say so with PCKh.'
    )


if __name__ == '__main__':
    cli.run(main)
