"""Training: objectives, batches, backends, SFT, DPO, reference log-probabilities.

`config` imports without torch; everything else needs it.
"""
