"""A small plan's settings, for tests that calibrate one."""

SETTINGS = dict(
    method='dpsgd',
    privacy_unit='instance',
    num_records=1000,
    expected_batch_size=50,
    steps=40,
    max_grad_norm=0.1,
    target_delta=5e-4,
)
