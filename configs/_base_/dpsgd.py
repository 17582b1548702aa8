# DP-SGD (Abadi et al. 2016): no public data.
_base_ = './private.py'

# Every record of most models is longer and is clipped. AdamW then moves as far with any shorter norm (docs/private_config.md).
dp_optim_wrapper = dict(max_grad_norm=1e-3)
