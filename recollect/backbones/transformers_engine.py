"""Any causal language model in this process, through `transformers`: the default engine.

Shared token prefixes (instructions, a user's memory, the two orders of one question) are read once per batch and
branched from the key/value cache; options and continuations are scored exactly, from float32 logits. bfloat16 where the
CPU has instructions for it, float32 elsewhere; a GPU is used where torch sees one.

Determinism: the same batch gives the same bits, whatever its order (calls are sorted before they are grouped). What
else is in a batch can change the last bits of a float, through padding and the shapes of the matrix products: about
1e-5 nat in float32, 1e-2 in bfloat16. With `batch_invariant=True` every call is computed alone and its answer has the
same bits in any company, at the price of the sharing between calls.
Not covered: encoder-decoder models, recurrent layers, several GPUs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from recollect.backbones.causal import CausalReader, Past
from recollect.backbones.chat_tokens import ChatTokenizer
from recollect.backbones.constrained import JsonConstraints
from recollect.backbones.decoding import Answering, order_of
from recollect.backbones.prefix_tree import add_wants, plan_segments
from recollect.backbones.protocol import Choice, Chosen, Completion, Request, Scored, Scoring
from recollect.backbones.store import check_folder, quiet_loading
from recollect.errors import ConfigError, InputError, ModelFileError
from recollect.io import canonical_json, read_json, sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16", "float16"]
# Grouping of the calls of one batch: rows read in one plan, so that the caches of a plan fit in memory.
PLAN_TOKENS = 32_768
# Rows of logits turned into log-probabilities at once: each costs the vocabulary twice over in float32.
LOGIT_ROWS = 256


class TransformersBackbone:
    """A model folder (config, tokenizer with chat template, safetensors) as a `Backbone`.

    Args:
        folder: the model folder; weights are checked against its manifest where it has one.
        adapter: a PEFT adapter folder, merged into the weights in float32 (this imports peft, which takes long).
        device: "cpu", "cuda", …; default: a GPU where there is one.
        dtype: default bfloat16 on a GPU and on CPUs with AVX512-BF16 or AMX, else float32.
        batch_size: chats written at the same time by `generate`.
        batch_tokens: padded tokens read in one pass.
        threads: CPU threads of torch, set once here for the whole process; default: what torch found.
        batch_invariant: compute every call alone (see the module's text).

    Raises:
        ModelFileError: a file is missing, corrupt, pickled, not finite, or of a kind transformers does not know.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        adapter: str | Path | None = None,
        device: str | None = None,
        dtype: Dtype | None = None,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        threads: int | None = None,
        batch_invariant: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("threads", threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        self.folder = Path(folder)
        files = check_folder(self.folder)
        torch.set_num_threads(threads or torch.get_num_threads())
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype: Dtype = dtype or _best_dtype(self.device)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelFileError(f"the tokenizer in {self.folder} cannot be loaded: {error}") from error
        self._chats = ChatTokenizer(tokenizer)
        adapter_files: dict[str, str] = {}
        if adapter is not None:
            adapter_files = check_adapter(Path(adapter))
        model = load_causal_model(self.folder, adapter, self.dtype)
        self.window = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))
        default_tokens = 4096 if self.device == "cpu" else 65_536
        torch.nn.Module.to(model, self.device)  # in place
        self._reader = CausalReader(model, batch_tokens or default_tokens)
        self._end_tokens = _end_tokens(model, tokenizer)
        self._constraints = JsonConstraints(tokenizer, model.config.get_text_config().vocab_size, self._end_tokens)
        self._batch_size = batch_size
        self._invariant = batch_invariant
        self._requested_tokens = 0
        self._lock = threading.RLock()
        identity = {"engine": "transformers", "device": self.device.split(":")[0], "dtype": self.dtype, "files": files}
        digest = sha256_text(canonical_json({**identity, "adapter": adapter_files}))
        self._fingerprint = f"transformers/{self.dtype}/{digest}"

    @property
    def fingerprint(self) -> str:
        """Hash over weights, tokenizer, template, adapter, dtype and kind of device."""
        return self._fingerprint

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every special or added token of the tokenizer, blanks excepted."""
        return self._chats.control_tokens

    def stats(self) -> dict[str, int]:
        """Tokens asked for (as reported in answers), tokens read by the model, the same with padding, and passes."""
        reader = self._reader
        return {
            "requested_tokens": self._requested_tokens,
            "computed_tokens": reader.computed_tokens,
            "padded_tokens": reader.padded_tokens,
            "passes": reader.passes,
        }

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        """Exact log-probabilities of continuations; each context is read once, whatever their number.

        Raises:
            InputError: context and longest continuation exceed the model's window.
        """
        branches = [self._branches(scoring.messages, scoring.continuations) for scoring in scorings]
        results = self._score_branches(branches)
        return [
            Scored(log_probs, tuple(len(tokens) for tokens in continuations), _n_tokens(context, continuations))
            for (context, continuations), log_probs in zip(branches, results, strict=True)
        ]

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]:
        """Log-probability of each option as the answer: the sum over its tokens, renormalised over the options.

        Raises:
            InputError: context and longest option exceed the model's window.
        """
        branches = [self._branches(choice.messages, choice.options) for choice in choices]
        answers = []
        for (context, options), log_probs in zip(branches, self._score_branches(branches), strict=True):
            scores = np.array(log_probs)
            normalised = scores - np.logaddexp.reduce(scores)
            answers.append(Chosen(tuple(normalised.tolist()), _n_tokens(context, options)))
        return answers

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Write answers, `batch_size` at a time. A sample depends on its prompt, parameters and seed.

        Raises:
            InputError: a prompt fills the model's window, or a schema cannot be enforced.
        """
        with self._lock:
            prompts = [tuple(self._chats.encode_chat(request.messages)) for request in requests]
            for prompt in prompts:
                self._check_window(len(prompt) + 1, len(prompt), 1)
            states = [self._answering(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
            order = sorted(range(len(requests)), key=lambda index: order_of(requests[index], prompts[index]))
            size = 1 if self._invariant else self._batch_size
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                self._write([states[index] for index in batch], [prompts[index] for index in batch])
            self._requested_tokens += sum(map(len, prompts))
        return [state.completion for state in states if state.completion is not None]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, D) float32: mean of the last hidden states over a text's tokens, L2-normalised.

        Texts beyond the window are cut at its end; an empty text gets the embedding of one blank.
        """
        rows = [tuple(self._chats.encode_text(text or " ")[: self.window]) for text in texts]
        result = np.zeros((len(rows), self._reader.model.config.get_text_config().hidden_size), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), rows[index]))
        with self._lock:
            for batch in _fill_batches(order, rows, 1 if self._invariant else self._reader.batch_tokens):
                states, mask = self._reader.hidden([rows[index] for index in batch])
                weights = mask[..., None].float()
                mean = (states.float() * weights).sum(1) / weights.sum(1)
                result[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return result

    def close(self) -> None:
        """Drop the model; the backbone cannot be used afterwards."""
        with self._lock:
            del self._reader

    def _branches(self, messages, texts: tuple[str, ...]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        context = tuple(self._chats.encode_chat(messages))
        continuations = [tuple(self._chats.encode_text(text)) for text in texts]
        longest = max(map(len, continuations))
        self._check_window(len(context) + longest, len(context), longest)
        return context, continuations

    def _check_window(self, total: int, context: int, answer: int) -> None:
        if total > self.window:
            raise InputError(
                f"a context of {context} tokens and an answer of {answer} do not fit the model's window of "
                f"{self.window} tokens; shorten the memory or use a model with a longer window"
            )

    def _score_branches(self, branches: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]) -> list[tuple[float, ...]]:
        """Log-probability (nats) of every continuation behind its context."""
        keys = [(context, tuple(continuations)) for context, continuations in branches]
        distinct = sorted(set(keys))  # equal calls are computed once; the order of the batch does not matter
        known: dict[tuple, tuple[float, ...]] = {}
        with self._lock:
            group: list[tuple] = []
            size = 0
            for key in distinct:
                n_tokens = _n_tokens(*key)
                if group and (self._invariant or size + n_tokens > PLAN_TOKENS):
                    known.update(zip(group, self._score_group(group), strict=True))
                    group, size = [], 0
                group.append(key)
                size += n_tokens
            if group:
                known.update(zip(group, self._score_group(group), strict=True))
            self._requested_tokens += sum(_n_tokens(*key) for key in keys)
        return [known[key] for key in keys]

    def _score_group(self, group: list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]) -> list[tuple[float, ...]]:
        branches = [(context, continuation) for context, continuations in group for continuation in continuations]
        # The last token of a continuation is predicted, never read.
        segments, ends = plan_segments([context + continuation[:-1] for context, continuation in branches])
        for branch, (context, continuation) in enumerate(branches):
            add_wants(segments, ends[branch], context + continuation, len(context), branch)
        parts = [np.zeros(len(continuation)) for _, continuation in branches]
        for _, answers, _ in self._reader.read_tree(segments):
            wants = [want for want, _ in answers]
            for want, log_prob in zip(wants, self._log_probs(answers), strict=True):
                parts[want[2]][want[3]] = log_prob
        sums = iter([float(part.sum()) for part in parts])
        return [tuple(next(sums) for _ in continuations) for _, continuations in group]

    def _log_probs(self, answers: list[tuple[tuple[int, int, int, int], torch.Tensor]]) -> list[float]:
        """Log-probability of each wanted token, from some rows of logits at a time.

        The parts are of nearly equal size, so that none has a single row: torch sums one row in another order.
        """
        n_parts = max(1, -(-len(answers) // LOGIT_ROWS))
        size = -(-len(answers) // n_parts)
        found: list[float] = []
        for start in range(0, len(answers), max(1, size)):
            part = answers[start : start + size]
            tokens = torch.tensor([want[1] for want, _ in part], device=self.device)
            logits = torch.stack([row for _, row in part])
            found += (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).cpu().tolist()
        return found

    def _answering(self, request: Request, prompt: tuple[int, ...]) -> Answering:
        constraint = self._constraints.start(request.schema) if request.schema else None
        room = self.window - len(prompt)
        return Answering(request, len(prompt), room, self._chats.tokenizer, frozenset(self._end_tokens), constraint)

    def _write(self, states: list[Answering], prompts: list[tuple[int, ...]]) -> None:
        """Write the answers of one batch to their ends."""
        segments, ends = plan_segments(prompts)
        for state, prompt, end in zip(range(len(states)), prompts, ends, strict=True):
            segments[end].wants.append((len(prompt) - 1 - segments[end].start, 0, state, 0))
        pasts: dict[int, Past] = {}
        for _, answers, kept in self._reader.read_tree(segments, keep=ends):
            pasts.update(kept)
            for want, logits in answers:
                states[want[2]].take(logits.cpu())
        alive = [index for index, state in enumerate(states) if state.completion is None]
        if not alive:
            return
        block = self._reader.stack([pasts[ends[index]] for index in alive])
        pasts.clear()
        while alive:
            rows = [states[index].pending for index in alive]
            logits = self._reader.read(block, rows, [(row, len(rows[row]) - 1) for row in range(len(rows))]).cpu()
            for row, index in enumerate(alive):
                states[index].take(logits[row])
            going = [row for row, index in enumerate(alive) if states[index].completion is None]
            if going and len(going) < len(alive):
                block = block.select(going)
            alive = [alive[row] for row in going]


def _n_tokens(context: Sequence[int], continuations: Sequence[Sequence[int]]) -> int:
    """What a call costs on its own: the context once plus every continuation."""
    return len(context) + sum(map(len, continuations))


def _fill_batches(order: list[int], rows: list[tuple[int, ...]], batch_tokens: int) -> list[list[int]]:
    """Cut an order by length into batches of at most `batch_tokens` padded tokens (at least one row each)."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * len(rows[index]) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _best_dtype(device: str) -> Dtype:
    if device != "cpu":
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def load_causal_model(folder: Path, adapter: str | Path | None, dtype: Dtype) -> PreTrainedModel:
    """The model of a folder, frozen, an adapter merged into it; never a pickle, never foreign code.

    Raises:
        ModelFileError: the folder or the adapter cannot be loaded, or a weight is not finite.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    # Merging is exact in float32; in bfloat16 small adapters would be rounded away.
    load_dtype = torch.float32 if adapter is not None else getattr(torch, dtype)
    try:
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=load_dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ModelFileError(f"the model in {folder} cannot be loaded: {str(error)[:500]}") from error
    if adapter is not None:
        model = _merged(model, Path(adapter), folder).to(getattr(torch, dtype))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelFileError(f"tensor {name!r} of {folder} is not finite; the weights are damaged")
    return model.eval().requires_grad_(False)


def _merged(model: PreTrainedModel, adapter: Path, folder: Path) -> PreTrainedModel:
    """The model of `folder` with an adapter in its weights.

    Raises:
        ModelFileError: the adapter is of another base model; PEFT itself would leave out the layers that do not match.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    own = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    other = f"the adapter in {adapter} does not fit the model in {folder}; it was trained on {own!r}"
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            held = set(file.keys())
        with quiet_loading(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of what is refused below
            adapted = PeftModel.from_pretrained(model, str(adapter))
            wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ModelFileError(f"{other}: {str(error)[:300]}") from error
    lacking = sorted(wanted - held) or sorted(name for name in held - wanted if "lora_" in name)
    if lacking:
        raise ModelFileError(f"{other}: {lacking[0]!r} is in one of the two only")
    return adapted.merge_and_unload()


def check_adapter(adapter: Path) -> dict[str, str]:
    """Hashes of an adapter's files; only safetensors are taken."""
    from recollect.io import sha256_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise ModelFileError(
                f"{adapter / name} is missing; an adapter folder holds adapter_config.json and "
                "adapter_model.safetensors (pickled adapter_model.bin is refused)"
            )
    kind = read_json(adapter / "adapter_config.json").get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR", "IA3"):
        raise ModelFileError(f"{adapter} is a {kind!r} adapter, which cannot be merged into the weights; use LoRA")
    return {name: sha256_file(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")}


def _end_tokens(model: PreTrainedModel, tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer, from the generation config and the tokenizer."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if not ends:
        raise ModelFileError("the model names no end-of-answer token (eos_token_id in generation_config.json)")
    return tuple(sorted(ends))
