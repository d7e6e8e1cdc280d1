"""`SaRDinEForCausalLM` for those who have srde: known to Transformers' auto classes, so that no code of a folder is run."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from srde.hub.configuration_sardine import SaRDinEConfig
from srde.hub.modeling_sardine import SaRDinEForCausalLM

AutoConfig.register(SaRDinEConfig.model_type, SaRDinEConfig, exist_ok=True)
AutoModelForCausalLM.register(SaRDinEConfig, SaRDinEForCausalLM, exist_ok=True)

__all__ = ["SaRDinEConfig", "SaRDinEForCausalLM"]
