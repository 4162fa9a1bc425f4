"""The megatron backend's model: tensor, pipeline and sequence parallel, on any layout.

`layout` and `families` import neither torch nor megatron-core. `cpu` is the only module that
knows of machines without CUDA.
"""
