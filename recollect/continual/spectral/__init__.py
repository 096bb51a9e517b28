"""SD-MoE (arXiv 2602.12556): experts split into a common dominant part and parts unique to each expert.

`projections` is the algebra, `linear` the layer, `projector` what must run after optimiser steps, `convert` the way
from and to a transformers checkpoint, `metrics` and `report` the diagnostics of any mixture of experts.
"""
