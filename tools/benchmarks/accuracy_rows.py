"""The rows of the table that accuracy.py fills: config and start of each method, and what is tuned for it.

Every private row has the same number of candidates. Must not train anything.
"""

from dataclasses import dataclass, field, replace
from typing import Any

Settings = dict[str, Any]  # config keys, as in --cfg-options


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        text: what the table calls it.
        config: the config's name after its family, such as 'dpsgd_eps08'.
        start: the row whose weights it starts from, or None.
        settings: config keys that are not tuned.
        candidates: what is tried on the tuning people; the best is what the table reports.
        private: has an epsilon.
        pictures: trains on the people of the public domain too, beside the views or the private people.
        public_alone: trains on the people of the public domain and on nobody else.
        unusual: of these, on the third in the most unusual poses.
        experts: rows on public people whose weights 'experts' mixes with those of ``start``.
        mean: no training: the mean of the weights of ``start`` and ``experts``.
        like: the row whose settings it takes, as they were tuned there; its own settings come on top.
    """

    text: str
    config: str
    start: str | None = 'pretrain'
    settings: Settings = field(default_factory=dict)
    candidates: tuple[Settings, ...] = ({},)
    private: bool = True
    pictures: bool = False
    public_alone: bool = False
    unusual: bool = False
    experts: tuple[str, ...] = ()
    mean: bool = False
    like: str | None = None


@dataclass(frozen=True)
class Size:
    """Size of the benchmark: numbers of people, epochs of each stage, and what is run by default.

    Attributes:
        few_epochs: of rows that train few parameters; twice ``epochs`` by default.
        plain_epochs: of the non-private rows; by default they see as many images as *ours*.
        tuned: whether each row's candidates are compared; else its first one is taken.
    """

    public: int = 6000
    private: int = 8000
    tested: int = 2000
    pretrain_epochs: int = 8
    public_epochs: int = 8
    epochs: int = 2
    epsilons: tuple[float, ...] = (0.8, 0.2, 0.4, 0.6)
    seeds: int = 3
    tuned: bool = True
    few_epochs: int | None = None
    plain_epochs: int | None = None

    @property
    def papers_batch(self) -> int:
        """The expected batch size at the paper's sample rate, 32 / 22246."""
        return max(round(self.private * 32 / 22246), 1)

    @property
    def large_batch(self) -> int:
        """A sixteenth of all people: sigma / B falls with B, as long as enough steps remain."""
        return self.private // 16

    def with_pictures(self, epochs: int) -> int:
        """Epochs over both domains that see at least as many images as ``epochs`` over the private one."""
        return -(-epochs * self.private // (self.private + self.public))


FULL = Size()
QUICK = Size(
    public=3000, private=3000, tested=600, pretrain_epochs=5, public_epochs=4, epsilons=(8.0,), seeds=1, tuned=False
)
MPII = Size(private=22246, public_epochs=10, epochs=25)

OPTIMIZER = 'optim_wrapper.optimizer'
PROJECTOR = 'optim_wrapper.projector'
PUBLIC_WEIGHT = 'optim_wrapper.public_weight'
AVERAGE = dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.1, gamma=10)


def model(channels: int) -> Settings:
    """A ResNet-18 for 64 x 64 crops, of ``channels`` in its first stage (64 in the original), with a SimCC head."""
    sizes = dict(base_channels=channels, stem_channels=channels, strides=(1, 2, 2, 1))
    return {
        'model.backbone': dict(_delete_=True, type='ResNet', depth=18, **sizes, init_cfg=None),
        'model.head.in_channels': 8 * channels,
        'model.head.in_featuremap_size': (4, 4),
    }


MODEL, WIDE = model(16), model(48)  # 0.7 million parameters, quick on a CPU; 6 million
IN_PROCESS: Settings = {'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False}
SYNTHETIC: Settings = {**MODEL, **IN_PROCESS}


def each(*parts: list[Settings]) -> tuple[Settings, ...]:
    """Every combination of one entry of each list."""
    combinations: list[Settings] = [{}]
    for part in parts:
        combinations = [{**c, **choice} for c in combinations for choice in part]
    return tuple(combinations)


def values(key: str, *choices: Any) -> list[Settings]:
    """A list of choices for one key."""
    return [{key: choice} for choice in choices]


def schedule(epochs: int) -> Settings:
    """``epochs`` with a cosine schedule."""
    cosine = dict(type='CosineAnnealingLR', eta_min=0.0, T_max=epochs, by_epoch=True, convert_to_iter_based=True)
    return {'train_cfg.max_epochs': epochs, 'train_cfg.val_interval': 1000, 'param_scheduler': [cosine]}


def papers_schedule(epochs: int) -> Settings:
    """The paper's: a tenth of the learning rate for the last fifth."""
    step = dict(type='MultiStepLR', milestones=[0.8 * epochs], gamma=0.1, by_epoch=True, convert_to_iter_based=True)
    return {**schedule(epochs), 'param_scheduler': [step]}


def wide_rows(rows: dict[str, Row]) -> dict[str, Row]:
    """Some of ``rows`` on a model of millions of parameters, with the settings that were tuned on the small one."""
    names = (
        'pretrain',
        'publiconly',
        'dpsgd_paper',
        'dpsgd',
        'projected',
        'hybrid_paper',
        'subspace',
        'ours',
        'nonprivate',
    )
    wide = {}
    for name in names:
        row = rows[name]
        start = f'wide_{row.start}' if row.start else None
        wide[f'wide_{name}'] = replace(row, start=start, settings=WIDE, candidates=(), like=name)
    return wide


DEFAULT_VIEW = dict(_delete_=True, type='PublicView', mode='blur')
PAPERS_VIEW = dict(_delete_=True, type='PublicView', mode='blur_full_resolution', kernel_size=25, sigma=10.0)


def adam(*rates: float) -> list[Settings]:
    """A choice of AdamW's learning rates."""
    return [{OPTIMIZER: dict(_delete_=True, type='AdamW', lr=lr)} for lr in rates]


def sgd(*rates: float) -> list[Settings]:
    """A choice of SGD's learning rates."""
    return [{OPTIMIZER: dict(_delete_=True, type='SGD', lr=lr, momentum=0.9)} for lr in rates]


# the choices of several rows
PAPERS_RATES, PLAIN_RATES = tuple(adam(1e-3, 3e-4, 1e-4)), tuple(adam(3e-3, 6e-3, 1.2e-2))
PAPERS_PROJECTOR = dict(_delete_=True, rank=100, order='noise-then-project', refresh_interval=50, dtype='bfloat16')
BEST = sgd(0.25)[0]  # of ours in a subspace
PLAIN = dict(private=False)
NO_VIEWS_FIRST: Settings = {'train_cfg.public_epochs': 0}
DATA, SAMPLER = 'train_dataloader.dataset', 'train_dataloader.batch_sampler'


def projector(**changed: Any) -> Settings:
    """The projector of ours, with changes."""
    ours = dict(rank=100, order='project-then-clip', refresh_interval=8, preconditioned=True, dtype='bfloat16')
    return {PROJECTOR: dict(_delete_=True, **{**ours, **changed})}


@dataclass(frozen=True)
class Rows:
    """The rows of a benchmark.

    Attributes:
        size: its size.
        common: settings of all rows.
        public_view: the view of the rows that have one.
    """

    size: Size
    common: Settings
    public_view: Settings

    def private(self, batch: int, public: int = 0, epochs: int | None = None) -> Settings:
        """Settings of private epochs with expected batches of ``batch``, and of ``public`` samples beside them."""
        view = {f'{DATA}.public_view': self.public_view} if public else {}
        sizes = {f'{SAMPLER}.expected_batch_size': batch}
        sizes |= {f'{SAMPLER}.public_batch_size': public} if public else {}
        return {**self.common, **view, **sizes, **schedule(self.size.epochs if epochs is None else epochs)}

    def paper(self, public: int = 0) -> Settings:
        """As ``private``, of the paper."""
        return {**self.private(self.size.papers_batch, public), **papers_schedule(self.size.epochs)}

    def views(self, epochs: int, samples: int) -> Settings:
        """Settings of public epochs alone, on so many samples."""
        steps = epochs * (samples // 64)  # public epochs have a length of their own
        cosine = dict(type='CosineAnnealingLR', eta_min=0.0, T_max=steps, by_epoch=False)
        first = {'param_scheduler': [cosine], 'train_cfg.public_epochs': epochs}
        return {**self.private(self.size.large_batch, 64, epochs), **first}

    @property
    def ours(self) -> Settings:
        """Settings of ours."""
        return {
            **self.private(self.size.large_batch, 64),
            **projector(),
            **NO_VIEWS_FIRST,  # it starts from the row that trained on them
            'default_hooks.public_data.num_samples': 200,
            PUBLIC_WEIGHT: 0.005,
        }

    @property
    def few(self) -> Settings:
        """A choice of ours: so few parameters that their noise is small in the whole space, norms+first_stage."""
        return {
            PROJECTOR: None,
            'optim_wrapper.trainable': 'norms+backbone.conv1.*+backbone.layer1.*',
            PUBLIC_WEIGHT: 0.02,
            **adam(3e-3)[0],
            **schedule(self.size.few_epochs or 2 * self.size.epochs),
        }

    def starts(self) -> dict[str, Row]:
        """The rows on public data alone, from which the others start."""
        size, both = self.size, self.size.with_pictures(self.size.public_epochs)
        pretrain = {**self.common, **schedule(size.pretrain_epochs)}
        return {
            'pretrain': Row('pretrained on public people', 'pretrain', None, pretrain, **PLAIN),
            'publiconly': Row(
                'public-only: then on the public views',
                'hybrid_eps08',
                'pretrain',
                self.views(size.public_epochs, size.private),
                PLAIN_RATES,
                **PLAIN,
            ),
            'public_pictures': Row(
                'public-only: on the public views and public people',
                'hybrid_eps08',
                'pretrain',
                self.views(both, size.private + size.public),
                PLAIN_RATES,
                pictures=True,
                **PLAIN,
            ),
        }

    def papers(self) -> dict[str, Row]:
        """DP-SGD, and the rows of the paper."""
        own = {PROJECTOR: PAPERS_PROJECTOR}
        projected_first = {PROJECTOR: {**PAPERS_PROJECTOR, 'order': 'project-then-clip'}}
        views = self.paper(self.size.papers_batch)
        hybrid = {**views, **own, **NO_VIEWS_FIRST, PUBLIC_WEIGHT: 0.1}
        return {
            'dpsgd_paper': Row(
                "DP-SGD, the paper's batch", 'dpsgd_eps08', settings=self.paper(), candidates=PAPERS_RATES
            ),
            'dpsgd': Row(
                'DP-SGD, large batch',
                'dpsgd_eps08',
                settings=self.private(self.size.large_batch),
                candidates=tuple(adam(2e-3, 1e-3, 5e-4)),
            ),
            'projected': Row(
                "Projected DP-SGD, the paper's order",
                'projected_eps08',
                settings={**self.paper(), **own},
                candidates=PAPERS_RATES,
            ),
            'projected_sgd': Row(
                'Projected DP-SGD, projected before it clips, SGD',
                'projected_eps08',
                settings={**self.paper(), **projected_first},
                candidates=tuple(sgd(0.002, 0.005, 0.02)),
            ),
            'feature': Row(
                'Feature DP', 'feature_eps08', settings={**views, PUBLIC_WEIGHT: 1.0}, candidates=PAPERS_RATES
            ),
            'hybrid_paper': Row("hybrid, the paper's form", 'hybrid_eps08', settings=hybrid, candidates=PAPERS_RATES),
        }

    def own(self) -> dict[str, Row]:
        """The rows of ours, from both starts on views."""
        few = {**self.few, **adam(1e-3)[0]}
        choices = (BEST, {**projector(rank=25), **BEST}, self.few)
        text, both = 'ours, from public-only on views', (BEST, few, self.few)
        return {
            'ours': Row(text, 'hybrid_eps08', 'publiconly', self.ours, choices),
            'ours_pictures': Row(f'{text} and public people', 'hybrid_eps08', 'public_pictures', self.ours, both),
        }

    def plain(self) -> dict[str, Row]:
        """The rows without privacy, which by default see as many images as ours."""
        size, both = self.size, self.size.with_pictures(self.size.public_epochs)
        alone = size.plain_epochs or size.public_epochs + size.epochs
        together = size.plain_epochs or both + size.with_pictures(2 * size.epochs)
        return {
            'nonprivate': Row(
                'non-private',
                'nonprivate',
                settings={**self.common, **schedule(alone)},
                candidates=PLAIN_RATES,
                **PLAIN,
            ),
            'nonprivate_pictures': Row(
                'non-private, on public people too',
                'nonprivate',
                settings={**self.common, **schedule(together)},
                candidates=PLAIN_RATES,
                pictures=True,
                **PLAIN,
            ),
        }

    def changes(self) -> dict[str, tuple[str, Settings]]:
        """Changes of ours in a subspace, each with its words."""
        whole = {PROJECTOR: None, PUBLIC_WEIGHT: 0.02, **adam(1e-3)[0]}
        first_stage = {'optim_wrapper.trainable': self.few['optim_wrapper.trainable']}
        by_parameter = {**whole, 'optim_wrapper.clipping': 'per-parameter'}
        papers_order = projector(order='noise-then-project', preconditioned=False)
        return {
            'noise_then_project': ("the paper's order of projection", papers_order),
            'not_preconditioned': ('without the preconditioner', projector(preconditioned=False)),
            'no_public_gradient': ('without the public gradient', {PUBLIC_WEIGHT: 0.0}),
            'papers_batch': ("at the paper's batch", self.private(self.size.papers_batch, 64)),
            'rank_25': ('rank 25', projector(rank=25)),
            'refresh_2': ('subspace refreshed every 2 steps', projector(refresh_interval=2)),
            'head': ("the paper's subset", {'optim_wrapper.trainable': 'head+last_stage+norms'}),
            'first_stage': ('norms and first stage alone', first_stage),
            'small_norm': ('C 0.01, lr 2.5', {'optim_wrapper.max_grad_norm': 0.01, **sgd(2.5)[0]}),
            'large_norm': ('C 1, lr 0.025', {'optim_wrapper.max_grad_norm': 1.0, **sgd(0.025)[0]}),
            'whole_model': ('without a projector, AdamW', whole),
            'per_layer': ('without a projector, AdamW, per-parameter clipping', by_parameter),
            'automatic': ('automatic clipping', {'optim_wrapper.clipping': 'automatic'}),
            'adaptive': ('adaptive clipping', {'optim_wrapper.clipping': 'adaptive'}),
            'augmentations': ('two augmentations per record', {f'{DATA}.augmentations': 2}),
            'average': ('averaged weights (EMA)', {'custom_hooks': [AVERAGE]}),
        }

    def levers(self) -> dict[str, Row]:
        """Ours in a subspace, and that with one change."""
        base = {**self.ours, **BEST}
        levers = {'subspace': Row('in a subspace of rank 100, SGD', 'hybrid_eps08', 'publiconly', base)}
        for name, (text, change) in self.changes().items():
            levers[name] = Row(f'the same, {text}', 'hybrid_eps08', 'publiconly', {**base, **change})
        levers['no_views_first'] = Row('the same, without views first', 'hybrid_eps08', 'pretrain', base)
        return levers


def rows_of(
    size: Size, common: Settings = SYNTHETIC, public_view: Settings = DEFAULT_VIEW
) -> tuple[dict[str, Row], dict[str, Row]]:
    """The table's rows, with ``common`` in their settings, and the levers: ``ours`` in a subspace, and that with one change."""
    rows = Rows(size, common, public_view)
    return {**rows.starts(), **rows.papers(), **rows.own(), **rows.plain()}, rows.levers()
