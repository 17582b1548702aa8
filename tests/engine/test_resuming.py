"""A resume or a second training in a work dir cannot make its statement, or a checkpoint's, say more than was done."""

import json
import re
import shutil
import sys
from fractions import Fraction

import pytest
import torch

from mmpose_dp.engine.hooks.budget_words import budgets_in_words, changed_budget
from mmpose_dp.engine.hooks.resuming import refuse_older_ledger
from mmpose_dp.extras.accountability import record_decision
from mmpose_dp.privacy.accounting import StepEvent, epsilon
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.verify import verify
from tests.support.paths import REPO
from tests.support.runs import config as validated
from tests.support.runs import logged, tiny, train, train_until
from tests.support.runs import unvalidated as config
from tests.support.statements import write_work_dir

sys.path.insert(0, str(REPO / 'tools'))
from publish_model import published  # noqa: E402

VIEW, HOOK = 'train_dataloader__dataset__public_view', 'default_hooks__privacy_budget__'


def statement_in(work_dir):
    return json.loads((work_dir / 'privacy_statement.json').read_text())


def log_of(work_dir):
    return ''.join(path.read_text() for path in work_dir.glob('*/*.log'))


def loaded(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(scope='module')
def feature(synthetic, tmp_path_factory):
    """A finished Feature DP training of one epoch."""
    work_dir = tmp_path_factory.mktemp('feature')
    train(config(synthetic, work_dir, 'feature', train_cfg__max_epochs=1, **{HOOK + 'target_epsilon': 4.0}))
    return work_dir


@pytest.mark.parametrize(
    ('method', 'options', 'message'),
    [
        ('dpsgd', {}, "method='feature' and the config says 'dpsgd'"),
        ('feature', {VIEW: dict(type='PublicView', mode='pixelate')}, "public_view='Gaussian.*the config says 'pixel"),
    ],
)
def test_a_resume_keeps_the_method_and_the_view(feature, synthetic, tmp_path, method, options, message):
    options.update(load_from=str(feature / 'epoch_1.pth'), resume=True)
    with pytest.raises(PrivacyError, match=message):
        train(config(synthetic, tmp_path, method, **options))
    assert not (tmp_path / LEDGER_NAME).exists()  # the refused training leaves the folder to another


def test_a_resume_of_a_finished_training_changes_nothing(feature, synthetic, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(feature, folder)
    cfg = config(synthetic, folder, 'feature', train_cfg__max_epochs=1, resume=True, **{HOOK + 'target_epsilon': 4.0})
    names = 'privacy_statement.json', 'privacy_statement.md', LEDGER_NAME, 'epoch_1.pth'
    before = [((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in names]
    assert statement_in(folder)['checkpoint']['file'] == 'epoch_1.pth'
    train(cfg)
    assert [((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in names] == before
    assert 'Training is finished: the checkpoint has all 1 epochs' in log_of(folder)
    other = config(synthetic, folder, 'feature', train_cfg__max_epochs=2, resume=True, **{HOOK + 'target_epsilon': 4.0})
    other.optim_wrapper.optimizer = dict(type='SGD', lr=0.1)
    with pytest.raises(
        PrivacyError, match=r'optim_wrapper\.optimizer: the checkpoint .* with AdamW, and the config says SGD\.'
    ):
        train(other)
    (folder / 'privacy_statement.json').unlink()  # killed before it was written
    # settings by which no step was taken are none of the training's
    cfg.default_hooks.privacy_budget.target_epsilon, cfg.optim_wrapper.max_grad_norm = 2.0, 7.0
    train(cfg)
    again, old = statement_in(folder), json.loads(before[0][0])
    assert {name for name in old if again.get(name) != old[name]} <= {'checkpoints', 'page_sha256', 'seal'}
    assert not verify(folder).wrong


def test_a_smaller_budget_is_not_taken_for_lost_steps(synthetic, tmp_path):
    train_until(config(synthetic, tmp_path, train_cfg__max_epochs=2), 5)
    train(config(synthetic, tmp_path, resume=True, train_cfg__max_epochs=2, **{HOOK + 'target_epsilon': 7.3}))
    log = log_of(tmp_path)
    assert '1 of the spent steps came after the checkpoint: they count' in log
    assert 'since the budget of epsilon 7.3 allows no more.' in log
    assert 'The budget was epsilon 8 and is now 7.3: what was spent stays spent.' in log
    assert statement_in(tmp_path)['epsilon'] <= 7.3


def test_a_spent_budget_ends_a_resume_at_once(synthetic, tmp_path):
    """The statement names the checkpoint at which the budget was spent, and a second resume finds nothing to change."""
    train_until(config(synthetic, tmp_path, train_cfg__max_epochs=2), 5)
    low = dict(resume=True, train_cfg__max_epochs=2, **{HOOK + 'target_epsilon': 7.5})
    train(config(synthetic, tmp_path, **low))
    (last,) = tmp_path.glob('budget_spent_iter_*.pth')
    seen = torch.load(last, weights_only=False)['meta']
    assert (seen['epoch'], f'budget_spent_iter_{seen["iter"]}') == (1, last.stem)  # where a resume goes on
    assert statement_in(tmp_path)['checkpoint']['file'] == last.name and not (tmp_path / 'epoch_2.pth').exists()
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.*') if path.suffix != '.py'}
    train(config(synthetic, tmp_path, **low))
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.*') if path.suffix != '.py'} == before
    train(
        config(synthetic, tmp_path, **low, load_from=str(tmp_path / 'epoch_1.pth'))
    )  # back to an earlier one: the same
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.*') if path.suffix != '.py'} == before
    assert not verify(tmp_path).wrong
    assert 'the budget of epsilon 7.5 is spent, and nothing is left to do' in log_of(tmp_path)
    assert 'For more steps, write a larger default_hooks.privacy_budget.target_epsilon.' in log_of(tmp_path)


def test_an_earlier_checkpoint_gives_no_steps_back(synthetic, tmp_path):
    """What is spent after it stays spent: of the plan no step is left, and a larger budget alone gives none."""
    options = dict(train_cfg__max_epochs=2, default_hooks__checkpoint__interval=1)
    train(config(synthetic, tmp_path, **options))
    before = (tmp_path / LEDGER_NAME).read_bytes()
    for budget in (8.0, 20.0):
        again = config(synthetic, tmp_path, **options, load_from=str(tmp_path / 'epoch_1.pth'), resume=True)
        again.default_hooks.privacy_budget.target_epsilon = budget
        train(again)
        assert (tmp_path / LEDGER_NAME).read_bytes() == before
    assert 'all 8 private steps are spent, those after this checkpoint too' in log_of(tmp_path)
    assert 'write a larger train_cfg.max_epochs and a larger default_hooks.privacy_budget.target_epsilon' in log_of(
        tmp_path
    )


def test_a_checkpoint_with_all_steps_has_lost_none(synthetic, tmp_path):
    """After an interruption training ends before its last epoch; its last checkpoint holds every step that was not lost before."""
    train_until(config(synthetic, tmp_path, train_cfg__max_epochs=2), 5)
    for _ in range(2):
        train(config(synthetic, tmp_path, train_cfg__max_epochs=2, resume=True))
    assert list(tmp_path.glob('budget_spent_iter_*.pth'))
    assert 'all 8 private steps are spent, and nothing is left to do' in log_of(tmp_path)


def test_a_resume_from_the_start_is_told_how_to_go_on(feature, synthetic, tmp_path):
    """A notebook sets ``resume`` after an interruption, and its ``load_from`` is still that of the start."""
    start = shutil.copy(feature / 'epoch_1.pth', tmp_path / 'start.pth')
    again = config(synthetic, feature, 'feature', resume=True, load_from=str(start))
    with pytest.raises(
        PrivacyError, match=r'is missing, so what .*start.pth has spent.* To go on from .*/epoch_1\.pth, write load_f'
    ):
        train(again)


def test_an_epoch_that_the_budget_ends_is_not_validated(synthetic, tmp_path):
    """Its scores had the number of the last whole epoch, and so had the best checkpoint that replaced that of this epoch."""
    options = dict(train_cfg__max_epochs=2, train_cfg__val_interval=1, default_hooks__checkpoint__save_best='PCK')
    train_until(tiny(validated(synthetic, tmp_path, 'dpsgd', **options)), 5)
    best = {path.name: path.read_bytes() for path in tmp_path.glob('best_*')}
    train(tiny(validated(synthetic, tmp_path, 'dpsgd', resume=True, **options)))
    log = log_of(tmp_path)
    assert len(re.findall(r'Epoch\(val\) \[1\].*PCK', log)) == 1 and len(best) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob('best_*')} == best
    assert re.search(
        r'spent: training stops\. budget_spent_iter_\d+\.pth is the last checkpoint, and was not validated', log
    )


def test_a_resume_of_nothing_spends_nothing(synthetic, tmp_path):
    with pytest.raises(PrivacyError, match=r'nothing to resume in .*leave out --resume \(or resume=True\) to spend'):
        train(config(synthetic, tmp_path, resume=True))
    assert not (tmp_path / LEDGER_NAME).exists()


def test_words_for_changed_budgets():
    assert changed_budget(8, 8) == changed_budget(None, 8) == '' and budgets_in_words([8, 8]) is None
    assert 'RAISED' in changed_budget(8, None) and budgets_in_words([8, None]) == '8 at first, then by a resume none'
    assert budgets_in_words([8.0, 12.0, 12.0, 4.0]) == '8 at first, then by a resume 12, then 4'
    old = Ledger()
    old.begin_run(privacy_unit='image')
    old.resume_run(privacy_unit='image', target_epsilon=3.0)
    assert old.budgets == (None, 3.0)


def test_a_resume_keeps_the_public_data(synthetic, synthetic_public, tmp_path):
    options = dict(public_root=synthetic_public, train_cfg__max_epochs=1)
    train(config(synthetic, tmp_path, 'projected', **options))
    other = synthetic_public / 'annotations/other.json'
    other.write_text((synthetic_public / 'annotations/mpii_train.json').read_text())
    options.update(resume=True, train_dataloader__dataset__public__ann_file='annotations/other.json')
    with pytest.raises(PrivacyError, match='public_data=.*mpii_train.json.*other.json'):
        train(config(synthetic, tmp_path, 'projected', **{**options, 'train_cfg__max_epochs': 2}))


def test_a_resume_takes_every_tensor_from_its_checkpoint(feature, synthetic, tmp_path):
    """One that stayed as an init_cfg made it would be in no statement."""
    shutil.copy(feature / LEDGER_NAME, tmp_path)
    checkpoint = loaded(feature / 'epoch_1.pth')
    del checkpoint['state_dict']['backbone.conv1.weight']
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')
    with pytest.raises(PrivacyError, match=r'resume from has no backbone\.conv1\.weight of shape'):
        train(
            config(
                synthetic, tmp_path, 'feature', resume=True, train_cfg__max_epochs=2, **{HOOK + 'target_epsilon': 4.0}
            )
        )
    assert (tmp_path / LEDGER_NAME).read_bytes() == (feature / LEDGER_NAME).read_bytes()


def annotated_anew(root, name, change):
    """Another annotation file beside the training set's, in which ``change`` was made to the first person; its path."""
    people = json.loads((root / 'annotations/mpii_train.json').read_text())
    change(people[0])
    (root / f'annotations/{name}.json').write_text(json.dumps(people))
    return {'train_dataloader__dataset__private__ann_file': f'annotations/{name}.json'}


def test_a_resume_keeps_the_boxes_that_the_view_follows(synthetic, tmp_path):
    """The picture of a box that became smaller has a second view, which shows more."""
    options = dict(train_cfg__max_epochs=2, optim_wrapper__noise_multiplier=1.0, **{HOOK + 'target_epsilon': None})
    smaller = annotated_anew(synthetic, 'smaller', lambda one: one.update(scale=one['scale'] / 2))
    joints = annotated_anew(synthetic, 'joints', lambda one: one['joints'][0].__setitem__(0, 5.0))
    train_until(config(synthetic, tmp_path, 'feature', **options), 5)
    with pytest.raises(
        PrivacyError, match=r'the boxes in its annotation file, or .*, are not those of the training befor'
    ):
        train(config(synthetic, tmp_path, 'feature', resume=True, **options, **smaller))
    train_until(config(synthetic, tmp_path, 'feature', resume=True, **options, **joints), 5)  # a blur follows no joint
    train_until(config(synthetic, tmp_path, 'feature', **options, **smaller), 1)
    assert log_of(tmp_path).count('a picture in which they differ gets a second view') == 1


def test_plain_dp_cannot_be_said_of_a_folder_with_a_view(feature, synthetic):
    """Its checkpoints are out, and a sum with them is Feature DP."""
    with pytest.raises(PrivacyError, match='Gaussian blur.*another work_dir'):
        train(config(synthetic, feature, train_cfg__max_epochs=1))


def test_a_ledger_that_lacks_stated_steps_is_refused(tmp_path):
    """An older copy of it was put back, or another one, or it was deleted with the checkpoints: steps would not be counted."""
    whole = write_work_dir(tmp_path, steps=3)
    refuse_older_ledger(whole, tmp_path)
    older = Ledger.parse(b''.join((tmp_path / LEDGER_NAME).read_bytes().splitlines(True)[:-1]))
    whole.count(StepEvent(1.0, Fraction(1, 10)))  # by a training that a kill ended before its next statement
    refuse_older_ledger(whole, tmp_path)
    refuse_older_ledger(Ledger(), tmp_path / 'none')
    for ledger in (older, write_work_dir(tmp_path / 'other', steps=5), Ledger()):
        with pytest.raises(PrivacyError, match='states steps that privacy_ledger.jsonl does not have'):
            refuse_older_ledger(ledger, tmp_path)


def test_a_ledger_that_lacks_the_steps_of_a_checkpoint_is_refused(tmp_path):
    """A backup of the small files, the ledger and its statement, was put back beside later checkpoints."""
    whole = write_work_dir(tmp_path, steps=3)
    older = Ledger.parse(b''.join((tmp_path / LEDGER_NAME).read_bytes().splitlines(True)[:-1]))
    (tmp_path / 'privacy_statement.json').unlink()
    kept = tmp_path / 'kept' / tmp_path.name  # CheckpointHook.out_dir
    kept.mkdir(parents=True)
    for folder, settings in ((tmp_path, {}), (kept, dict(out_dir=str(tmp_path / 'kept'), filename_tmpl='{}.ckpt'))):
        path = folder / settings.get('filename_tmpl', 'epoch_{}.pth').format(1)
        torch.save(dict(privacy=dict(ledger=whole.state_dict())), path)
        refuse_older_ledger(whole, tmp_path, **settings)
        with pytest.raises(PrivacyError, match=f'{path.name} in .* states steps that privacy_ledger.jsonl does not h'):
            refuse_older_ledger(older, tmp_path, **settings)
        path.unlink()
    torch.save(dict(state_dict={}), tmp_path / 'plain.pth')  # of no private training
    refuse_older_ledger(older, tmp_path)


def test_a_new_training_beside_later_checkpoints_is_refused(synthetic, tmp_path):
    """It was calibrated to what the older ledger had spent."""
    train(config(synthetic, tmp_path, train_cfg__max_epochs=1))
    lines = (tmp_path / LEDGER_NAME).read_bytes().splitlines(True)
    (tmp_path / LEDGER_NAME).write_bytes(b''.join(lines[:2]))
    (tmp_path / 'privacy_statement.json').unlink()
    with pytest.raises(PrivacyError, match=r'epoch_1.pth in .* states steps that .*Put the ledger back'):
        train(config(synthetic, tmp_path, train_cfg__max_epochs=1, **{HOOK + 'target_epsilon': 20.0}))


def test_a_lost_ledger_is_missed(synthetic, tmp_path):
    train(config(synthetic, tmp_path, train_cfg__max_epochs=1))
    (tmp_path / LEDGER_NAME).rename(tmp_path / 'kept.jsonl')
    with pytest.raises(PrivacyError, match='is missing.*epoch_1.pth.*another work_dir'):
        train(config(synthetic, tmp_path, train_cfg__max_epochs=1))
    torch.save(dict(state_dict={}), tmp_path / 'plain.pth')  # newer, and of no private training
    with pytest.raises(PrivacyError, match='is missing.*epoch_1.pth.*another work_dir'):
        train(config(synthetic, tmp_path, train_cfg__max_epochs=1))
    (tmp_path / 'kept.jsonl').rename(tmp_path / LEDGER_NAME)
    with pytest.raises(PrivacyError, match='already spent'):
        train(config(synthetic, tmp_path, train_cfg__max_epochs=1))


def test_a_resume_may_change_noise_rate_and_length(synthetic, tmp_path):
    none = {HOOK + 'target_epsilon': None}
    train_until(config(synthetic, tmp_path, optim_wrapper__noise_multiplier=0.6, **none), 4)
    options = dict(train_dataloader__batch_sampler__expected_batch_size=8, train_cfg__max_epochs=2, **none)
    ledger = train(config(synthetic, tmp_path, resume=True, optim_wrapper__noise_multiplier=0.7, **options))
    found = ledger.optim_wrapper.ledger.history
    assert [(e.noise_multiplier, str(e.sample_rate)) for e, _ in found] == [(0.6, '1/4'), (0.7, '1/5')]
    assert statement_in(tmp_path)['epsilon'] == epsilon(found, 1e-3)


def test_every_checkpoint_is_published_with_what_it_spent_itself(synthetic, tmp_path):
    """Finished at epsilon 4, resumed for more and killed: the newest checkpoint has spent more than was once stated."""
    train(config(synthetic, tmp_path, train_cfg__max_epochs=1, **{HOOK + 'target_epsilon': 4.0}))
    assert statement_in(tmp_path)['steps'] == 4
    record_decision(tmp_path, dict(purpose='gait', rationale='small'))
    decided = {HOOK + 'decision': dict(rationale='smaller')}
    train_until(
        config(synthetic, tmp_path, resume=True, **decided, train_cfg__max_epochs=3, optim_wrapper__max_grad_norm=0.5),
        9,
    )
    for epoch in (1, 2):
        checkpoint = loaded(tmp_path / f'epoch_{epoch}.pth')
        given = published(checkpoint)['privacy_statement']
        assert given['steps'] == 4 * epoch == sum(entry[2] for entry in checkpoint['privacy']['ledger']['entries'])
    stated = statement_in(tmp_path)
    del stated['checkpoints']  # which are not published
    assert given == stated and given['private'] and 4 < given['epsilon'] <= 8
    assert given['target_epsilon_changed'] == '4 at first, then by a resume 8'
    assert (given['decision']['purpose'], given['decision']['rationale']) == ('gait', 'smaller')  # filled in between
    assert given['max_grad_norm'] == '0.001, then by a resume 0.5'
    assert 'THE BUDGET WAS RAISED: it was epsilon 4 and now it is 8' in log_of(tmp_path)
    assert Ledger.read(tmp_path / LEDGER_NAME).steps == 9


def test_exposed_metrics_stay_told(synthetic, tmp_path):
    """The checkpoints written before the resume hold them, and so does the message hub that goes on."""
    options = {HOOK + 'expose_private_metrics': True}
    train_until(config(synthetic, tmp_path, train_cfg__max_epochs=2, **options), 5)
    for options in (dict(resume=True), dict(optim_wrapper__noise_multiplier=9.0)):  # resumed, then a second training
        train(config(synthetic, tmp_path, train_cfg__max_epochs=2, **options, **{HOOK + 'target_epsilon': 20.0}))
        statement = statement_in(tmp_path)
        assert 'message hub' in statement['released'] and 'expose_private_metrics' in str(statement['not_covered'])


def test_steps_without_noise_mark_all_that_follows(synthetic, tmp_path):
    none = {HOOK + 'target_epsilon': None, 'train_cfg__max_epochs': 2}
    train_until(config(synthetic, tmp_path, optim_wrapper__noise_multiplier=0.0, **none), 5)
    train(config(synthetic, tmp_path, resume=True, optim_wrapper__noise_multiplier=1.0, **none))
    assert not statement_in(tmp_path)['private']
    with pytest.raises(PrivacyError, match='NOT PRIVATE'):
        published(loaded(tmp_path / 'epoch_2.pth'))


def test_a_resume_without_private_steps_is_refused(synthetic, tmp_path):
    """It would write checkpoints that know of no ledger."""
    train(config(synthetic, tmp_path, 'hybrid', train_cfg__max_epochs=2))
    options = dict(train_cfg__max_epochs=3, train_cfg__public_epochs=3)
    with pytest.raises(PrivacyError, match='public_epochs=3.*no private step'):
        train(config(synthetic, tmp_path, 'hybrid', resume=True, **options))


def test_checkpoints_hold_no_step_times(feature, synthetic, tmp_path):
    """They hint at how many records were sampled. The running training still logs them, also after a resume."""
    hub = loaded(feature / 'epoch_1.pth')['message_hub']
    names = {*hub['log_scalars'], *hub['runtime_info'], *hub['resumed_keys']}
    assert not {name for name in names if name.split('/')[-1] in ('time', 'data_time', 'memory', 'eta')}
    assert 'train/loss_public' in hub['log_scalars']
    assert re.fullmatch(r'20\d{6}', loaded(feature / 'epoch_1.pth')['meta']['time'])  # the day alone
    options = dict(load_from=str(feature / 'epoch_1.pth'), resume=True, train_cfg__max_epochs=2)
    runner = train(config(synthetic, tmp_path, 'feature', **options))
    assert len(logged(tmp_path)['time']) == len(logged(tmp_path)['data_time']) == 4
    assert len(runner.message_hub.get_scalar('train/time').data[0]) == 4
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'eta: ' in log and 'is not defined in message_hub' not in log
