"""Prompts: versioned templates, untrusted text made safe, model output parsed or refused."""

from recollect.prompts.render import Renderer, fence_of, template_version, template_versions
from recollect.prompts.untrusted import Neutralizer

__all__ = ["Neutralizer", "Renderer", "fence_of", "template_version", "template_versions"]
