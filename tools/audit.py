"""Attack a private training: does what an attacker can infer from it refute the epsilon that a config claims?

python tools/audit.py CONFIG [--canaries 500] [--report-to WORK_DIR]
python tools/audit.py CONFIG --attack lira [--shadows 16] [--records 500] [--seed 0]

The first, one run, turns private records into canaries, includes or excludes each at random (Steinke et al. 2023), trains once, and
prints a lower bound on epsilon beside the claim. A bound above the claim proves a fault; a bound below it does not prove that there
is none. The second, LiRA (Carlini et al. 2022), trains several models, each on a random half of the records, and guesses from each
record's loss whether a model has seen it: a weaker attacker, who has the final weights alone. It takes plain configs too, which
show what privacy prevents. Do not use the trained weights. The exit status is 1 if the claim is refuted.
"""

import argparse
import json
import math
import sys
from datetime import date
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
from cli import add_cfg_options, building, fraction, merge_options, positive, read_config, run
from mmengine.config import Config
from mmengine.runner import Runner

from mmpose_dp.auditing.audited_training import AuditHook
from mmpose_dp.auditing.membership import AttackResult, attack_result, likelihood_ratios
from mmpose_dp.auditing.shadow_training import train_shadows
from mmpose_dp.engine.half_private import is_private
from mmpose_dp.extras.accountability import record_audit
from mmpose_dp.extras.evidence import file_sha256, intact_statement
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.validation import rounded_up

# what decides how a model is trained
_TRAINING = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'custom_hooks')


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config', help='private config (with lira, plain ones too); the audit takes as long as its training'
    )
    parser.add_argument('--attack', choices=['one-run', 'lira'], default='one-run', help='default: one-run')
    parser.add_argument('--shadows', type=positive, default=16, help='lira: number of models (default 16)')
    parser.add_argument('--records', type=positive, help='lira: records to guess, chosen at random (default: all)')
    parser.add_argument(
        '--seed', type=int, default=0, help='lira: seed of the random halves and of plain trainings (default 0)'
    )
    parser.add_argument('--canaries', type=positive, help='one-run: records to turn into canaries (default: all)')
    parser.add_argument(
        '--confidence', type=fraction, default=0.95, help='confidence of the lower bounds (default 0.95)'
    )
    parser.add_argument(
        '--work-dir', help='one-run: folder for ledger and log, a new one for each audit (default work_dirs/audit)'
    )
    parser.add_argument(
        '--report-to', type=Path, help='one-run: work dir of the training, whose statement then has the result'
    )
    add_cfg_options(parser)
    return parser.parse_args()


def audited(cfg: Config, canaries: int | None, confidence: float, report_to: Path | None = None) -> Config:
    """The config with canaries planted, and without what an audit does not need. Its own hooks stay."""
    cfg.optim_wrapper.type = 'AuditedOptimWrapper'
    hook = dict(type='AuditHook', num_canaries=canaries, confidence=confidence)
    hook['report_to'] = None if report_to is None else str(report_to)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    # the attacker records each public batch as it is sampled, so no worker may sample in advance
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.pop('prefetch_factor', None)
    cfg.default_hooks.checkpoint = None
    return cfg


def refuse_another_config(cfg: Config, work_dir: Path) -> None:
    """Raises PrivacyError if the training of a work dir had another config, by the copy whose hash its statement has."""
    wanted = (intact_statement(work_dir) or {}).get('config_sha256')
    copies = [path for path in sorted(work_dir.glob('*.py')) if file_sha256(path) == wanted]
    if not copies:
        return  # what the statement says is compared before the first step
    had = Config.fromfile(copies[0])
    other = [key for key in _TRAINING if _plain(cfg.get(key)) != _plain(had.get(key))]
    if other:
        raise PrivacyError(
            f'--report-to {work_dir}: its training had another {", ".join(other)} than this config. Audit its own: {copies[0]}'
        )


def _plain(value: Any) -> Any:
    """A part of a config, for comparison; none at all is an empty one."""
    return json.loads(json.dumps(value or None, default=str))


def attack(cfg: Config) -> AuditHook:
    """Trains and returns the hook that attacked."""
    with building(cfg):
        runner = Runner.from_cfg(cfg)
    runner.train()
    return next(hook for hook in runner.hooks if isinstance(hook, AuditHook))


def reported(hook: AuditHook, confidence: float) -> dict[str, Any]:
    """The result with its date, as the statement needs it."""
    assert hook.result is not None
    return dict(
        date=date.today().isoformat(),
        refuted=bool(hook.refuted),
        epsilon_lower_bound=float(hook.result.epsilon_lower_bound),
        epsilon_lower_bound_any_mechanism=float(hook.result.one_run),
        epsilon_lower_bound_independent=float(hook.result.independent),
        epsilon_claimed=float(hook.claim),
        mu_lower_bound=float(hook.result.mu),
        mu_claimed=float(hook.claimed_mu) if math.isfinite(hook.claimed_mu) else None,
        canaries=len(hook.chosen),
        confidence=confidence,
        attack=hook.result.attack,
        audited=hook.audited,
    )


def lira(cfg: Config, shadows: int, records: int | None, seed: int, confidence: float) -> bool:
    """Trains, attacks and prints; returns whether more members were found than the guarantee allows."""
    found = train_shadows(cfg, shadows, records, seed)
    result = attack_result(likelihood_ratios(found.losses, found.members), found.members, confidence)
    print(f'\n\n{shadows} models, {found.losses.shape[1]} records, each in about half of the models')
    for line in table(result, found.bound, confidence):
        print(line)
    refuted = any(result.lower_limits[rate] > most for rate, most in found.bound.items())
    verdict = 'REFUTED: the claim does not hold' if refuted else 'not refuted'
    print(verdict if found.bound else 'no guarantee to compare with')
    return refuted


def table(result: AttackResult, bound: dict[float, float], confidence: float) -> list[str]:
    """The result in lines; ``bound`` is empty where nothing is guaranteed."""
    lines = [
        f'{"of those not trained on, wrongly named":<40}{"members found":>15}{f"surely, {confidence:.0%}":>18}{"allowed":>10}'
    ]
    for rate, share in result.true_positive_rates.items():
        allowed = f'{bound[rate]:.2%}' if bound else '-'
        lines.append(f'{f"{rate:.1%}":<40}{f"{share:.2%}":>15}{f"{result.lower_limits[rate]:.2%}":>18}{allowed:>10}')
    return [
        *lines,
        f'AUC {result.auc:.3f} (0.5 is chance), standard deviation from model to model {result.deviation:.3f}',
    ]


def main() -> None:
    """Prints the bounds beside the claim."""
    args = parse_args()
    cfg = read_config(args.config, 'model', 'train_dataloader', 'optim_wrapper')
    merge_options(cfg, args.cfg_options)
    if args.attack == 'lira':
        if any(given is not None for given in (args.report_to, args.canaries, args.work_dir)):
            raise PrivacyError(
                '--report-to, --canaries and --work-dir belong to --attack one-run: leave them out with --attack lira'
            )
        if lira(cfg, args.shadows, args.records, args.seed, args.confidence):
            sys.exit(1)
        return
    if args.report_to is not None and not args.report_to.is_dir():
        raise PrivacyError(f'--report-to {args.report_to}: there is no such work dir')
    if not is_private(cfg):
        raise PrivacyError(
            f'{args.config} is not a private config, so there is no claim to attack: --attack lira takes plain ones, and '
            'tools/check_config.py says how to make it private'
        )
    if args.report_to is not None:
        refuse_another_config(cfg, args.report_to)
    cfg = audited(cfg, args.canaries, args.confidence, args.report_to)
    cfg.work_dir = args.work_dir or 'work_dirs/audit'
    hook = attack(cfg)
    found, claim = hook.result, hook.claim
    assert found is not None
    print(f'\n{len(hook.chosen)} canaries, {hook.members.sum()} of them in; best attack: {found.attack}')
    print(f'epsilon claimed                                             {rounded_up(claim)}')
    print(f'lower bound, any mechanism (Steinke et al. 2023)            {found.one_run:.3f}')
    print(f'lower bound, if canaries are independent trials             {found.independent:.3f}')
    print(f'mu of Gaussian DP claimed                                   {rounded_up(hook.claimed_mu)}')
    print(f'lower bound on mu, any mechanism (Mahloujifar et al. 2024)  {found.mu:.3f}')
    if hook.dimensions is not None and len(hook.chosen) > hook.dimensions:
        print(
            f'The projector has {hook.dimensions} dimensions for {len(hook.chosen)} canaries, which hide one another there: a low '
            'bound says less than it does without a projector'
        )
    print('REFUTED: the claim does not hold' if hook.refuted else 'not refuted')
    if args.report_to is not None:
        record_audit(args.report_to, reported(hook, args.confidence))
    if hook.refuted:
        sys.exit(1)


if __name__ == '__main__':
    run(main)
