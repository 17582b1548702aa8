r"""How long per-sample gradients are: of private people, of public people, and of pictures of noise with joints at random places.

    python tools/benchmarks/norms.py --people FOLDER_OF_PEOPLE --weights FOLDER_OF_WEIGHTS --start mobilenetv2 \
        --checkpoint unusual.pth --experts turned.pth people.pth start.pth

Before training, mmpose_dp judges ``max_grad_norm`` by the last of the three, which cost no privacy: the table says how well that
fits. Rewrites the table of docs/accuracy_people.md between its marks. NOT private: it reads private people without noise. Must not
train.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import numpy as np
from accuracy_rows import IN_PROCESS
from accuracy_worker import REPO, config_of, set_up
from mmengine.hooks import Hook
from mmengine.runner import Runner
from people_rows import STARTS, TRAINABLE, people_parser
from performance_page import table, write_between

from mmpose_dp.datasets import collate_samples
from mmpose_dp.engine.hooks.fitting_norm import noise_with_joints
from mmpose_dp.engine.hooks.preflight import first_usable, untouched_training

SHARES = (0.05, 0.5, 0.95)


class NormsHook(Hook):
    """Finds the norms when the weights are loaded, and stops before the first step.

    Attributes:
        people: of the people that training would see, spread over the set.
        noise: of as many pictures of noise.
    """

    priority = 'LOWEST'

    def __init__(self, count: int) -> None:
        self.count = count
        self.people: list[float] = []
        self.noise: list[float] = []

    def before_train(self, runner: Runner) -> None:
        """See the class."""
        dataset, norms_alone = runner.train_dataloader.dataset, runner.optim_wrapper.norms_alone
        everybody = range(len(dataset.private))
        with untouched_training(runner):
            runner.model.train()
            for index in everybody[:: -(-len(everybody) // self.count)]:
                samples = dataset[index]
                self.people += norms_alone(collate_samples([samples])) if samples else []
            for batch in noise_with_joints(first_usable(dataset, everybody), dataset.private, self.count):
                self.noise += norms_alone(batch)
        runner.train_loop.stop_training = True


def norms(args: argparse.Namespace, trained: str, people: Path, folder: str) -> NormsHook:
    """The norms for people of one set, of the parameters that ``trained`` names."""
    mixed = 'experts' in trained
    settings = {**IN_PROCESS, TRAINABLE: trained, 'log_level': 'ERROR'}
    job: dict[str, Any] = dict(family=STARTS[args.start].model, weights=str(args.weights), config='dpsgd_eps08')
    job |= dict(settings=settings, epsilon=8.0, seed=0, folder=folder, load_from=str(args.checkpoint.resolve()))
    job |= dict(experts=[str(one.resolve()) for one in args.experts] if mixed else [])
    job |= dict(train_on=f'{people}/', pictures=False, public=None)
    cfg = config_of(job)
    if mixed:
        cfg.optim_wrapper.mix_from = args.mix_from
    runner, hook = Runner.from_cfg(cfg), NormsHook(args.samples)
    runner.register_hook(hook)
    runner.train()
    return hook


def in_words(found: list[float]) -> str:
    """The median, and between which norms nine of ten are."""
    least, median, most = np.quantile(found, SHARES)
    return f'{median:.1e} ({least:.1e} to {most:.1e})'


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = people_parser(__doc__, REPO / 'docs/accuracy_people.md')
    parser.add_argument(
        '--checkpoint', type=Path, required=True, metavar='FILE', help='what private training starts from'
    )
    parser.add_argument('--experts', type=Path, nargs='*', default=[], metavar='FILE', help='models to mix it with')
    parser.add_argument('--mix-from', choices=('mean', 'load_from'), default='mean', help='where mixing begins')
    parser.add_argument('--samples', type=int, default=64, help='of each kind (default 64)')
    return parser.parse_args()


def main() -> None:
    """Finds the norms of each choice of parameters, and rewrites the table."""
    args = parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    set_up()
    choices = {'all parameters': 'all', 'few parameters': STARTS[args.start].few}
    if args.experts:
        choices['mixing weights, channel by channel'] = 'channel_experts'
    private, public = (args.people / name for name in args.people_sets)
    lines = []
    for text, trained in choices.items():
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            own, others = norms(args, trained, private, one), norms(args, trained, public, other)
        lines.append([text, *map(in_words, (own.people, others.people, own.noise))])
        print(*lines[-1], sep=' | ', flush=True)
    head = ['what is trained', 'private people', 'public people', 'pictures of noise']
    write_between(args.page, (f'<!-- norms_{args.start} -->', f'<!-- /norms_{args.start} -->'), table(head, lines))


if __name__ == '__main__':
    main()
