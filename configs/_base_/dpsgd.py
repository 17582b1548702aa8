# DP-SGD (Abadi et al. 2016): no public data.
_base_ = './private.py'
