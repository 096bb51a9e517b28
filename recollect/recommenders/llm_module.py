"""The network of an LLM-centric recommender: a causal decoder that reads item vectors instead of words.

Input: embedded instruction, then one vector W_in E[i] + b_in per history item (plus W_t times the item's frozen text
vector, optionally), then, under last-position supervision, the embedded response marker. Output: W_out h, N rows, no
bias. E is copied from a conventional model and frozen; LoRA adapters, W_in, W_t and W_out are trained (E4SRec, arXiv
2312.02443). The vocabulary head is not loaded and nothing is generated.

The instruction is the same for every row, so it is read once per pass and its keys and values are shared; gradients
flow through them. Padding lies between instruction and history, positions come from the cumulative mask.
Not covered: decoders without a key/value cache (state-space models); what a batch is trained towards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from recollect.errors import ConfigError, ModelFileError
from recollect.recommenders.llm_batches import LlmBatch
from recollect.recommenders.llm_config import Precision, Supervision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTRUCTION = (
    "Below is the history of items a user chose, oldest first. Predict the item the user chooses next.\n\n"
    "### History:\n"
)
MARKER = "\n\n### Next item:"
HEAD_STD = 0.02  # of W_out before training


def require_layers(folder: Path, keep_layers: int | None) -> None:
    """Refuse to keep more blocks than a decoder has, without loading its weights.

    Raises:
        ConfigError: as said.  ModelFileError: the folder describes no model.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        n_layers = int(config.get_text_config().num_hidden_layers)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelFileError(f"the model in {folder} cannot be loaded: {str(error)[:500]}") from error
    if keep_layers is not None and not 1 <= keep_layers <= n_layers:
        raise ConfigError(f"keep_layers must be in 1..{n_layers} for {folder.name}, got {keep_layers!r}")


def load_trunk(folder: Path, keep_layers: int | None) -> tuple[PreTrainedModel, int]:
    """The decoder without its vocabulary head, cut to its first blocks and the final norm, frozen, in float32.

    Returns:
        (the trunk, the number of blocks kept).

    Raises:
        ConfigError: more blocks are to be kept than there are.
        ModelFileError: the folder cannot be loaded, or a weight is not finite.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    from recollect.backbones.store import check_folder, quiet_loading

    check_folder(folder)
    require_layers(folder, keep_layers)
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every block that is left out on purpose
    try:
        with quiet_loading():
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            text = config.get_text_config()
            n_layers = int(text.num_hidden_layers)
            keep = n_layers if keep_layers is None else keep_layers
            text.num_hidden_layers = keep
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:keep]
            trunk = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                # On a CPU the backward pass of the fused kernel costs more than all else at rows this short (measured).
                attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ModelFileError(f"the model in {folder} cannot be loaded: {str(error)[:500]}") from error
    finally:
        logging.set_verbosity(shown)
    for name, tensor in trunk.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelFileError(f"tensor {name!r} of {folder} is not finite; the weights are damaged")
    return trunk.eval().requires_grad_(False), keep


def token_ids(folder: Path) -> tuple[list[int], list[int]]:
    """Tokens of the instruction and of the response marker."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return tokenizer.encode(INSTRUCTION), tokenizer.encode(MARKER, add_special_tokens=False)


def best_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """bf16 where the hardware multiplies it faster (measured: 1.5 times the training speed with AMX), else fp32."""
    if precision != "auto":
        return precision
    if device.type != "cpu":
        return "bf16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


class LlmModule(nn.Module):
    """See the module's text.

    Args:
        trunk: the decoder without head, wrapped by PEFT or plain.
        instruction, marker: token ids.
        embedding: (N, d) the conventional model's item vectors.
        text: (N, D_t) frozen text vectors, or None.
        supervision: where h is read.
        precision: of the decoder's arithmetic; heads and scores are float32.
    """

    trunk: Any
    embedding: Tensor
    text: Tensor
    instruction: Tensor
    marker: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        instruction: list[int],
        marker: list[int],
        embedding: Tensor,
        text: Tensor | None,
        supervision: Supervision,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.trunk = trunk
        words = self.decoder.get_input_embeddings().weight.detach()
        width = words.shape[1]
        self.supervision = supervision
        self.precision = precision
        self.register_buffer("instruction", words[instruction].clone(), persistent=False)  # (P, D)
        self.register_buffer("marker", words[marker].clone(), persistent=False)  # (Q, D)
        self.register_buffer("embedding", embedding.detach().float().clone())  # (N, d)
        self.register_buffer("text", None if text is None else text.detach().float().clone())
        self.project_in = nn.Linear(embedding.shape[1], width)
        self.project_text = nn.Linear(text.shape[1], width, bias=False) if text is not None else None
        self.head = nn.Linear(width, len(embedding), bias=False)
        nn.init.zeros_(self.project_in.bias)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        # Item vectors start at the size of words, whatever the size of E: a residual stream of another size would
        # drown, or be drowned by, what the blocks add. Half the size squared for each of two sources.
        parts: list[tuple[nn.Linear, Tensor]] = [(self.project_in, self.embedding)]
        if self.project_text is not None:
            parts.append((self.project_text, self.text))
        size = float(words.square().mean().sqrt()) / len(parts) ** 0.5
        for layer, vectors in parts:
            nn.init.normal_(layer.weight)
            own = float(torch.nn.functional.linear(vectors, layer.weight).square().mean().sqrt().detach())
            with torch.no_grad():
                layer.weight.mul_(size / max(own, 1e-12))

    @property
    def decoder(self) -> Any:
        """The decoder itself, with adapters inside where there are any."""
        return self.trunk.get_base_model() if hasattr(self.trunk, "get_base_model") else self.trunk

    @property
    def n_items(self) -> int:
        return self.head.out_features

    def inject(self, embedding: Tensor) -> None:
        """Take in the conventional model's new item vectors (N, d).

        Raises:
            ConfigError: another number of items or another width.
        """
        if embedding.shape != self.embedding.shape:
            raise ConfigError(
                f"item vectors are {tuple(embedding.shape)} where the LLM recommender reads "
                f"{tuple(self.embedding.shape)}"
            )
        with torch.no_grad():
            self.embedding.copy_(embedding)

    def item_inputs(self, items: Tensor) -> Tensor:
        """(…, D) what the decoder reads for items (…)."""
        vectors = self.project_in(self.embedding[items])
        return vectors if self.project_text is None else vectors + self.project_text(self.text[items])

    def states(self, batch: LlmBatch) -> Tensor:
        """h (M, D) float32 of every sample of a batch; rows do not influence each other."""
        from transformers.cache_utils import DynamicCache

        device = self.embedding.device
        kind = best_precision(self.precision, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=kind == "bf16"):
            cache = DynamicCache()
            shared = self.decoder(inputs_embeds=self.instruction[None], past_key_values=cache, use_cache=True)
            n_rows, n_shared = len(batch.items), len(self.instruction)
            cache.batch_repeat_interleave(n_rows)
            inputs, real = self.item_inputs(batch.items), batch.real
            if self.supervision == "last":
                inputs = torch.cat([inputs, self.marker.expand(n_rows, -1, -1).to(inputs.dtype)], 1)
                real = torch.cat([real, real.new_ones(n_rows, len(self.marker))], 1)
            mask = torch.cat([real.new_ones(n_rows, n_shared), real], 1).long()
            positions = (mask.cumsum(1) - 1)[:, n_shared:]
            output = self.decoder(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        hidden = output.last_hidden_state
        if batch.flat is not None:
            return hidden.flatten(0, 1)[batch.flat].float()
        last = hidden[:, -1]
        if self.supervision == "dense":  # a row without history is answered from the instruction alone
            last = torch.where(batch.real.any(1)[:, None], last, shared.last_hidden_state[0, -1])
        return last.float()

    def logits(self, batch: LlmBatch) -> Tensor:
        """(M, N) float32."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self.head(self.states(batch))


def semantic_head(text: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """W_out (N, width) from text vectors (N, D_t): centred, through one random projection, at the usual size.

    Inner products of rows then follow the similarity of the texts, so related items start with related scores.
    """
    centred = text - text.mean(0)
    projected = centred @ torch.randn(text.shape[1], width, generator=generator)
    return projected * (HEAD_STD / projected.square().mean().sqrt().clamp_min(1e-12))
