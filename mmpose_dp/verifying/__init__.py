"""The checks of ``python -m mmpose_dp.verify``, one module per thing that is checked.

Must not import torch or run code of a file. Must not say of anything that it was checked if it was not: it is named as unchecked.

- ``findings``: what was checked, what is wrong, what could not be checked; and the files that belong together.
- ``schema``: the form of a statement's values.
- ``statement``: the statement by itself: version, schema, seal, page.
- ``ledger``: the ledger, and the steps from which epsilon follows.
- ``rebuilt``: the statement written again from the ledger, and compared word by word.
- ``figures``: epsilon, delta and the risk figures.
- ``inside``: the statement beside those that checkpoints carry.
- ``files``: checkpoints, published files, configs, and what was not looked at.
- ``published``: the one form of a published checkpoint and of a safetensors file.
- ``archive``: the one form of the zip archive that torch writes.
"""
