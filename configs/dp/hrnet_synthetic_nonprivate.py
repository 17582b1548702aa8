# The non-private twin of configs/dp/hrnet_synthetic_*: plain training on the private domain. Offers NO privacy.
_base_ = '../_base_/hrnet_synthetic.py'
