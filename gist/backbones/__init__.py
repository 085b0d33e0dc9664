"""Backbones: timm vision transformers and where their weights come from."""

from gist.backbones.create import create_backbone

__all__ = ["create_backbone"]
