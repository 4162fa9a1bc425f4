"""The configuration of a chain: one dataclass a section, most of them from the rooms they shape.

A chain file is YAML over `ChainConfig`; `insightv run CHAIN key=value …` overrides single keys.
"""
