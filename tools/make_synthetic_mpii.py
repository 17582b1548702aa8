"""Make a synthetic data set in the MPII format. See mmpose_dp.datasets.synthetic; must not hold logic of its own."""

import argparse
import time

from cli import run

from mmpose_dp.datasets.synthetic import make_synthetic_mpii


def main() -> None:
    """Reads the arguments and makes the data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--out', default='data/synthetic_private', help='folder to write, laid out as data/mpii (default %(default)s)'
    )
    parser.add_argument(
        '--domain', default='private', choices=['public', 'private'], help='how people look (default %(default)s)'
    )
    parser.add_argument('--train', type=int, default=6000, help='people in the training set (default %(default)s)')
    parser.add_argument('--val', type=int, default=1000, help='people in the validation set (default %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other people (default %(default)s)')
    parser.add_argument('--image-size', type=int, default=192, help='height in pixels (default %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='number of processes (default %(default)s)')
    parser.add_argument('--force', action='store_true', help='overwrite another data set in --out')
    args = parser.parse_args()
    start = time.time()
    sizes = args.train, args.val, args.seed, args.image_size, args.workers
    out = make_synthetic_mpii(args.out, args.domain, *sizes, args.force)
    print(f'{args.train} + {args.val} people ({args.domain}) in {out}, {time.time() - start:.0f} s')


if __name__ == '__main__':
    run(main)
