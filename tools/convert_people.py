"""Makes a data set in MPII's layout of Leeds Sports Pose (extended or not) or of COCO's people.

    python tools/convert_people.py lsp FOLDER --out data/people/lspet           # FOLDER has joints.mat and images/
    python tools/convert_people.py coco person_keypoints_val2017.json PICTURES --out data/people/coco_val2017

See mmpose_dp.datasets.converting; must not hold logic of its own. Read the licences of the pictures before you publish any.
"""

import argparse
from pathlib import Path

import cli

from mmpose_dp.datasets.converting import coco_people, lsp_people, write_people


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest='source', required=True)
    lsp = sources.add_parser('lsp', help='Leeds Sports Pose, or its extended training set')
    lsp.add_argument('folder', type=Path, help='what the archive was unpacked to: joints.mat and images/')
    coco = sources.add_parser('coco', help='people with keypoints in COCO')
    coco.add_argument('annotations', type=Path, help='such as person_keypoints_val2017.json')
    coco.add_argument('pictures', type=Path, help='folder of the pictures that it names')
    for source, least in ((lsp, 8), (coco, 6)):
        source.add_argument('--out', type=Path, required=True, help='folder to write, laid out as data/mpii')
        source.add_argument(
            '--least-joints', type=int, default=least, help='people with fewer annotated joints are left out'
        )
        source.add_argument('--longest-side', type=int, default=112, help='larger people are reduced to it, in pixels')
        source.add_argument('--val-share', type=float, default=0.2, help='share of people to validate on')
        source.add_argument('--seed', type=int, default=0, help='another seed divides the people differently')
        source.add_argument('--force', action='store_true', help='overwrite another data set in --out')
    return parser.parse_args()


def main() -> None:
    """Reads the arguments and converts."""
    args = parse_args()
    if args.source == 'lsp':
        people = lsp_people(args.folder, args.least_joints)
    else:
        people = coco_people(args.annotations, args.pictures, args.least_joints)
    train, val = write_people([*people], args.out, args.longest_side, args.val_share, args.seed, args.force)
    print(
        f'{train} + {val} people in {args.out}. Their head size is estimated where the source has none: say so with PCKh.'
    )


if __name__ == '__main__':
    cli.run(main)
