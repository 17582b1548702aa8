"""Write model-index.yml, a metafile for each family of configs in configs/dp/, and the tables of configs/dp/README.md.

    python tools/docs/metafiles.py

In MMPose's form, which ``mim`` and mmengine read. Everything is taken from the configs as they load. Must not hold results: scores
are in docs/accuracy.csv, with the runs behind them.
"""

import argparse
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import yaml
from mmengine.config import Config

REPO = Path(__file__).resolve().parents[2]
FOLDER = 'configs/dp'
METHODS = {
    'DP-SGD': ('Deep Learning with Differential Privacy', '1607.00133'),
    'Projected DP-SGD': (
        'Bypassing the Ambient Dimension: Private SGD with Gradient Subspace Identification',
        '2007.03813',
    ),
    'Feature DP': ('Machine Learning with Privacy for Protected Attributes', '2506.19836'),
    'Hybrid': ('Differentially Private 2D Human Pose Estimation', '2504.10190'),
    'public views only': None,
    'not private': None,
}
# of each family, the glob of its configs; a config belongs to the first one that fits
FAMILIES = {
    'hrnet_synthetic': 'hrnet_synthetic_*.py',
    'humanart': '*_humanart_*.py',
    'hrnet_mpii': 'hrnet_mpii_*.py',
    'backbones_mpii': '*_mpii*_hybrid_*.py',
}
TITLES = {
    'hrnet_synthetic': 'A small HRNet on synthetic people (`make demo`)',
    'humanart': 'HumanArt',
    'hrnet_mpii': 'HRNet-w32 on MPII, every method and budget',
    'backbones_mpii': "The hybrid on MMPose's other MPII models",
}


def family_of(config: Path) -> str:
    """The family of a config. Raises StopIteration if it belongs to none."""
    return next(name for name, pattern in FAMILIES.items() if config.match(pattern))


def method_of(cfg: Config) -> str:
    """The method that the settings make."""
    if cfg.optim_wrapper.get('type') != 'DPOptimWrapper':
        return 'not private'
    if cfg.train_cfg.get('public_epochs') == cfg.train_cfg.max_epochs:
        return 'public views only'
    views, projected = bool(cfg.train_dataloader.dataset.get('public_view')), 'projector' in cfg.optim_wrapper
    return {(False, False): 'DP-SGD', (False, True): 'Projected DP-SGD', (True, False): 'Feature DP'}.get(
        (views, projected), 'Hybrid'
    )


def entry(path: Path) -> dict[str, Any]:
    """What a metafile says of one config."""
    cfg = Config.fromfile(path)
    method, dataset = method_of(cfg), cfg.train_dataloader.dataset
    private = dataset if method == 'not private' else dataset.private
    data = 'synthetic people' if 'synthetic' in path.stem else private.type.removesuffix('Dataset')
    meta: dict[str, Any] = {'Training Data': {'Mpii': 'MPII'}.get(data, data)}
    meta['Architecture'] = [cfg.model.backbone.type, cfg.model.head.type]
    if METHODS[method]:
        budget = cfg.default_hooks.privacy_budget
        meta.update(
            {
                'Privacy Unit': dataset.privacy_unit,
                'Epsilon': budget.target_epsilon,
                'Delta': float(f'{budget.target_delta:.3g}'),
                'Expected Batch Size': cfg.train_dataloader.batch_sampler.expected_batch_size,
                'Epochs': cfg.train_cfg.max_epochs,
            }
        )
        if dataset.get('public_view'):
            meta['Public View'] = dataset.public_view.get('mode', 'blur')
        if dataset.get('public'):
            meta['Public Data'] = 'synthetic people' if 'synthetic' in dataset.public.data_root else dataset.public.type
    return {'Name': path.stem, 'In Collection': method, 'Config': f'{FOLDER}/{path.name}', 'Metadata': meta}


def table(family: str, models: list[dict[str, Any]]) -> str:
    """A family's table, for people."""
    lines = [f'## {TITLES[family]}', '', f'[{family}.yml]({family}.yml)', '']
    lines += ['| config | method | model | epsilon | batch |', '| --- | --- | --- | ---: | ---: |']
    for model in models:
        meta = model['Metadata']
        name = f'[{model["Name"]}]({model["Name"]}.py)'
        cells = name, model['In Collection'], ', '.join(meta['Architecture'])
        lines.append(f'| {" | ".join(cells)} | {meta.get("Epsilon", "")} | {meta.get("Expected Batch Size", "")} |')
    return '\n'.join(lines)


def collection(name: str, paper: tuple[str, str] | None) -> dict[str, Any]:
    """What model-index.yml says of a method."""
    source = {'Paper': dict(Title=paper[0], URL=f'https://arxiv.org/abs/{paper[1]}')} if paper else {}
    return {'Name': name, **source, 'README': 'docs/methods.md'}


def written(repo: Path = REPO) -> dict[str, str]:
    """The files to write, by their path in the repository."""
    models: dict[str, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for path in sorted((repo / FOLDER).glob('*.py')):
        models[family_of(path)].append(entry(path))
    note = '# Written by tools/docs/metafiles.py from the configs. Results: docs/accuracy.csv.\n'
    collections = [collection(name, paper) for name, paper in METHODS.items()]
    index = {'Collections': collections, 'Import': [f'{FOLDER}/{family}.yml' for family in models]}
    files = {f'{FOLDER}/{family}.yml': note + dump({'Models': found}) for family, found in models.items()}
    tables = [table(family, found) for family, found in models.items()]
    heading = (
        '# Configs\n\nWritten by `python tools/docs/metafiles.py`. Scores and the runs behind them: '
        '[accuracy](../../docs/accuracy.md). How to train them: [README](../../README.md#train-on-mpii).'
    )
    return {
        'model-index.yml': note + dump(index),
        **files,
        f'{FOLDER}/README.md': '\n\n'.join([heading, *tables]) + '\n',
    }


def dump(content: dict[str, Any]) -> str:
    """As YAML, in the given order and without anchors."""
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    return yaml.dump(content, Dumper=dumper, sort_keys=False, width=120)


def main() -> None:
    """Writes the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, text in written().items():
        (REPO / path).write_text(text)
        print(path)


if __name__ == '__main__':
    main()
