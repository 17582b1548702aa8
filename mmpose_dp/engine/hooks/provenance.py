"""Where the weights of a training come from: what the checkpoints that it descends from were trained on, hop by hop.

Must not let a private training, or one on public views, be forgotten because another one lies in between.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.runner import CheckpointLoader
from torch import nn

CHECKPOINT_KEY = 'privacy'  # of what a checkpoint says about its own privacy: ledger, statement, pretraining, descent


@dataclass(frozen=True)
class Descent:
    """What is known of the trainings behind some weights.

    Attributes:
        private: one of them took private steps.
        public_views: what their public views kept of each record, in words.
        public_data_sets: the data sets that they took as public, in words.
    """

    private: bool = False
    public_views: tuple[str, ...] = ()
    public_data_sets: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Any) -> 'Descent':
        """That of a checkpoint of ours or a published one; of any other nothing is known."""
        published, privacy = _part(checkpoint, 'privacy_statement'), _part(checkpoint, CHECKPOINT_KEY)
        told = published or _part(privacy, 'descent')  # published: made by tools/publish_model.py
        private = bool(published or spent_in(checkpoint)) or told.get('private', False)
        return cls(private, tuple(told.get('public_views', ())), tuple(told.get('public_data_sets', ())))

    def joined(self, other: 'Descent') -> 'Descent':
        """What is known of both."""
        views = dict.fromkeys([*self.public_views, *other.public_views])
        data = dict.fromkeys([*self.public_data_sets, *other.public_data_sets])
        return Descent(self.private or other.private, tuple(views), tuple(data))

    def in_words(self) -> str:
        """What a statement says of it; empty where there is nothing to say."""
        told = []
        if self.private:
            told.append(', which a private training made: were it on the same records, its ledger is to be added')
        told += [
            f', which were trained on public views ({view}): were these of the same records, what they show is not protected'
            for view in self.public_views
        ]
        told += [
            f', which were trained on {data} as public data: what is in it is not protected'
            for data in self.public_data_sets
        ]
        return ''.join(told)


def spent_in(checkpoint: Any) -> list:
    """The ledger's entries in a checkpoint; none where there is no ledger, or nothing that can be read as one."""
    return _part(_part(checkpoint, CHECKPOINT_KEY), 'ledger').get('entries') or []


def _part(whole: Any, key: str) -> dict:
    """A dict inside a dict; of a foreign or damaged file, an empty one."""
    found = whole.get(key) if isinstance(whole, dict) else None
    return found if isinstance(found, dict) else {}


def loaded_by_init_cfg(model: nn.Module) -> list[str]:
    """The checkpoints that MMPose's ``init_cfg=dict(type='Pretrained', checkpoint=...)`` names, anywhere in a model."""
    found: list[str] = []
    for module in model.modules():
        settings = getattr(module, 'init_cfg', None) or []
        for one in [settings] if isinstance(settings, dict) else settings:
            if isinstance(one, dict) and one.get('type') == 'Pretrained':
                found.append(str(one.get('checkpoint')))
    return list(dict.fromkeys(found))


def descent_of_file(path: str) -> Descent:
    """That of a checkpoint on the disk; of one elsewhere nothing is known."""
    return Descent.of(CheckpointLoader.load_checkpoint(path, 'cpu')) if Path(path).is_file() else Descent()
