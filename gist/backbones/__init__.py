"""Backbones: timm vision transformers and where their weights come from."""

from gist.backbones.weights import create_backbone

__all__ = ["create_backbone"]
