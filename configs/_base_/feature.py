# Feature DP: the blurred and coarsely sampled view of each record is public. Its gradient enters the update without noise.
_base_ = './private.py'

dp_dataset = dict(public_view=dict(type='PublicView', mode='blur'))
dp_batch_sampler = dict(public_batch_size=32)
dp_optim_wrapper = dict(public_weight=0.01)
