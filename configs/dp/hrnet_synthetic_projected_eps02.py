_base_ = './hrnet_synthetic_projected_eps08.py'

default_hooks = dict(privacy_budget=dict(target_epsilon=0.2))
