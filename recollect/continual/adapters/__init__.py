"""Low-rank expert adapters for frozen decoders: plain LoRA, LoRAMoE, MH-MoE and what grows, gates and exports them.

from recollect.continual.adapters.attach import attach, routing_loss
from recollect.continual.adapters.config import MHMoEConfig
from recollect.continual.adapters.saving import from_pretrained, save_pretrained

model = attach(model, MHMoEConfig(heads=4, experts=4))
loss = model(**batch).loss + routing_loss(model)
save_pretrained(model, "adapters")
"""
