# Training on the public views alone: what Feature DP gives for free. The row that a private method has to beat.
_base_ = './hrnet_synthetic_hybrid_eps08.py'

train_cfg = dict(max_epochs=20, public_epochs=20)
