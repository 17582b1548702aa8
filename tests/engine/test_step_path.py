"""A privacy reviewer reads what one step runs: docs/guarantee.md lists it file by file, and it stays short."""

import gc
import re
import sys
from collections import defaultdict
from pathlib import Path

import mmpose_dp
from mmpose_dp.engine.loops import PrivateTrainLoop
from tests.support.paths import REPO
from tests.support.runs import train, unvalidated

PACKAGE = Path(mmpose_dp.__file__).parent
# of mmengine's hooks, of lines of the log, and helpers that the page names in its text
NOT_LISTED = {'engine/optim_wrappers/stepping.py', 'processes.py', 'tensors.py'}


def test_one_step_runs_what_the_page_lists(synthetic, tmp_path, monkeypatch):
    steps, whole = defaultdict(set), PrivateTrainLoop._run_micro_batch

    def note(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if event == 'call' and PACKAGE in path.parents and not frame.f_code.co_name.startswith('<'):
            steps[noted.iteration].add((str(path.relative_to(PACKAGE)), frame.f_code.co_qualname))

    def noted(self, wrapper, batch):
        assert gc.get_freeze_count()  # a collection does not look at all that MMPose has loaded
        noted.iteration = self._iter
        sys.setprofile(note if self._iter else None)
        try:
            return whole(self, wrapper, batch)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(PrivateTrainLoop, '_run_micro_batch', noted)
    train(unvalidated(synthetic, tmp_path, train_cfg__max_epochs=1, default_hooks__logger__interval=100))
    assert not gc.get_freeze_count()
    # an early step may also look for samples that mix, if no batch before, whose size is random, could tell
    usual = [step for step in steps.values() if not any(file == 'gradients/independence.py' for file, _ in step)]
    assert len(steps) == 3 and len(usual) > 1
    seen = usual[0] | usual[1]
    files = {file for file, _ in seen}
    page = (REPO / 'docs/guarantee.md').read_text()
    listed = set(re.findall(r'`(\w+/[\w/]+\.py)`', page[page.index('| order |') : page.index('### Options')]))
    assert files - listed <= NOT_LISTED and {'privacy/clipping.py', 'privacy/noise.py', 'privacy/ledger.py'} <= files
    print(f'{len(files)} files and {len(seen)} functions')
    assert len(files) <= 25 and len(seen) <= 161
