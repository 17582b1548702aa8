"""The demo: makes synthetic people, pretrains on the public ones, trains a private model, and compares its accuracy.

    python tools/demo/demo.py [--out work_dirs/demo] [--seeds 3]

Every stage is one of the project's own commands and is printed when it starts, so that you can repeat it by hand. A stage whose
result already exists is not run again. Must not hold anything of the guarantee.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from statistics import mean, stdev

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
from demo_page import draw_page

from mmpose_dp.privacy.validation import rounded_up

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / 'configs/dp'
PEOPLE = {'public': 6000, 'private': 4000}
TWO_PROCESSES = ['env_cfg.dist_cfg.backend=gloo', 'train_dataloader.batch_size=64', 'train_dataloader.num_workers=1']
START = time.time()


def say(text: str) -> None:
    """Prints with the time since the start."""
    sys.stdout.write(f'[{time.time() - START:5.0f} s] {text}\n')  # one call, since two threads write
    sys.stdout.flush()


def call(log: Path, script: str, *arguments: object) -> None:
    """Runs a tool of this project; its output goes to ``log``. Raises RuntimeError with the end of the log if the tool fails."""
    root = f'{REPO}/'
    command = [f'tools/{script}', *(str(a).replace(root, '') for a in arguments)]
    interpreter = [] if script.endswith('.sh') else [sys.executable]
    say(shlex.join(['python', *command] if interpreter else command))
    log.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', PYTHON=sys.executable)
    with open(log, 'w') as file:
        done = subprocess.run([*interpreter, *command], cwd=REPO, env=env, stdout=file, stderr=file)
    if done.returncode:
        raise RuntimeError(f'{shlex.join(command)} failed; the end of {log}:\n{log.read_text()[-2000:]}')


def train(out: Path, name: str, folder: str, *options: str, processes: int = 1) -> Path:
    """Trains configs/dp/hrnet_synthetic_{name}.py; returns its last checkpoint."""
    last = out / folder / 'last_checkpoint'
    finished = out / folder / 'finished'
    if not finished.exists():
        resume = []
        if last.exists():  # it was interrupted
            resume, options = ['--resume'], tuple(o for o in options if not o.startswith('load_from='))
        config = CONFIGS / f'hrnet_synthetic_{name}.py'
        start = ['train.py', config] if processes == 1 else ['dist_train.sh', config, processes]
        call(out / f'{folder}.log', *start, '--work-dir', out / folder, *resume, '--cfg-options', *options)
        finished.touch()
    return Path(last.read_text())


def test(out: Path, name: str, checkpoint: Path, folder: str) -> float:
    """Mean PCKh@0.5 of a checkpoint on the private domain's validation people; keeps the predictions."""
    scores = out / folder / 'scores.json'
    if not scores.exists():
        config = CONFIGS / f'hrnet_synthetic_{name}.py'
        arguments = [config, checkpoint, '--work-dir', out / folder]
        arguments += ['--out', scores, '--dump', out / folder / 'predictions.pkl']
        call(out / f'{folder}_test.log', 'test.py', *arguments)
    return float(json.loads(scores.read_text())['PCK'])


def at_once(*lanes) -> None:
    """Runs functions in threads side by side; raises what one of them raised."""
    failed = []

    def guarded(lane) -> None:
        try:
            lane()
        except Exception as error:  # raised below, in the main thread
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(lane,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def one_seed(out: Path, seed: int) -> dict[str, float]:
    """Pretraining, then hybrid beside public-only and non-private. Private noise and sampling have no seed."""
    seeded = f'randomness.seed={seed}'
    found = {}
    start = train(out, 'pretrain', 'pretrain', seeded, *TWO_PROCESSES, processes=2)
    load = f'load_from={start}'

    def private_lane() -> None:
        found['start'] = test(out, 'nonprivate', start, 'start_test')
        trained = train(out, 'hybrid_eps08', 'hybrid', load, seeded)
        found['hybrid'] = test(out, 'nonprivate', trained, 'hybrid_test')
        if seed == 0:  # the report is of this one
            examine_view(out)

    def plain_lane() -> None:
        trained = train(out, 'publiconly', 'publiconly', load, seeded)
        found['public-only'] = test(out, 'nonprivate', trained, 'publiconly_test')
        found['public-only, tested on views'] = test(out, 'publiconly', trained, 'publiconly_views_test')
        trained = train(out, 'nonprivate', 'nonprivate', load, seeded)
        found['non-private'] = test(out, 'nonprivate', trained, 'nonprivate_test')

    at_once(private_lane, plain_lane)
    return found


def examine_view(out: Path) -> None:
    """Finds out what can be recovered from the hybrid's public views, of a few validation people."""
    if not (out / 'hybrid/view_audit.npz').exists():
        options = ['--images', 6, '--minutes', 0.3, '--public-images', 'data/synthetic_public/images']
        call(
            out / 'view.log',
            'audit_view.py',
            CONFIGS / 'hrnet_synthetic_hybrid_eps08.py',
            '--work-dir',
            out / 'hybrid',
            *options,
        )


def report(run: Path) -> Path:
    """The page of the hybrid training, beside the other models; its people are synthetic and may be shown."""
    names = {'start': 'before', 'publiconly': 'public views alone', 'nonprivate': 'without privacy'}
    scores = [f'{name}={run / folder}_test/scores.json' for folder, name in names.items()]
    pictures = ['--view-pictures', '--predictions', run / 'hybrid_test/predictions.pkl']
    call(run / 'report.log', 'make_report.py', run / 'hybrid', '--scores', *scores, *pictures)
    return run / 'hybrid/privacy_report.html'


ROWS = {
    'start': 'public-pretrained start, no private data',
    'public-only': 'public-only: trained on the public views',
    'public-only, tested on views': '   the same model, given views of the test images',
    'hybrid': 'hybrid, epsilon {epsilon}',
    'non-private': 'non-private training',
}


def table(results: list[dict[str, float]], epsilon: float) -> str:
    """The scores, mean and spread over seeds."""
    lines = [f'{"mean PCKh@0.5 on new people of the private domain":<52}{"PCKh":>7}']
    for key, text in ROWS.items():
        values = [r[key] for r in results]
        spread = f'  +- {stdev(values):.1f} ({len(values)} seeds)' if len(values) > 1 else ''
        lines.append(f'{text.format(epsilon=rounded_up(epsilon)):<52}{mean(values):>7.1f}{spread}')
    return '\n'.join(lines)


def main() -> None:
    """Runs all stages, prints the table and makes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'), help='folder of the results')
    parser.add_argument('--seeds', type=int, default=1, help='number of repetitions, for the spread (default 1)')
    args = parser.parse_args()
    out = args.out.resolve()
    for domain, count in PEOPLE.items():
        data = ['--domain', domain, '--out', f'data/synthetic_{domain}', '--train', count, '--val', 1000]
        call(out / f'data_{domain}.log', 'make_synthetic_mpii.py', *data, '--image-size', 128)
    results = []
    try:
        for seed in range(args.seeds):
            results.append(one_seed(out / f'seed{seed}', seed))
    except RuntimeError as error:
        sys.exit(str(error))
    run = out / 'seed0'
    statement = json.loads((run / 'hybrid/privacy_statement.json').read_text())
    (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        draw_page(run, out)
        page = report(run)
    print(f'\n{table(results, statement["epsilon"])}\n')
    print(f'{statement["guarantee"]}: {statement["protected"]}')
    for text, path in (
        ('private model', (run / 'hybrid/last_checkpoint').read_text()),
        ('privacy statement', run / 'hybrid/privacy_statement.md'),
        ('training curve', out / 'curve.png'),
        ('page of pictures', out / 'pictures.png'),
        ('report of it all', page),
    ):
        print(f'{text + ":":<20}{path}')
    say('done')


if __name__ == '__main__':
    main()
