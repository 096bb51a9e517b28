"""vLLM in this process: one-box batch jobs, mostly on a GPU.

Chats are turned into token ids here (`chat_tokens`), so scoring and text see the same prompt and no message can add a
control token. `score` and `choose` ask for the log-probabilities of prompt tokens; vLLM's prefix cache does not serve
those, so every continuation reads its context again. An adapter is merged into a temporary copy of the weights:
with LoRA enabled a request for prompt log-probabilities ends vLLM's CPU engine (0.32).
vLLM starts its engine in a child process: call from a script guarded by `if __name__ == "__main__"`. What else is in a
batch can change the last bits of its floats, and with them a sample.
Not covered: embeddings, several engines.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.backbones.chat_tokens import ChatTokenizer
from recollect.backbones.protocol import Choice, Chosen, Completion, Request, Scored, Scoring
from recollect.backbones.store import check_folder
from recollect.errors import BackboneError, ConfigError, InputError, MissingExtra
from recollect.io import canonical_json, sha256_text

Branches = tuple[tuple[int, ...], list[tuple[int, ...]]]


class VLLMBackbone:
    """A model folder served by `vllm.LLM` as a `Backbone`.

    Args:
        folder: config, tokenizer with chat template, safetensors.
        adapter: a LoRA folder, merged before the engine starts (needs peft and room for a copy of the weights).
        concurrency: sequences the engine runs at the same time.
        dtype: vLLM's name of it; "auto" takes the one in the config.
        max_model_len: window to reserve memory for; default: the model's, which may not fit.
        memory_share: share of the device's memory the engine may take; default: vLLM's own.

    Raises:
        MissingExtra: vLLM is not installed.
        ModelFileError: as `TransformersBackbone`.
        BackboneError: the engine did not start.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        adapter: str | Path | None = None,
        concurrency: int = 64,
        dtype: str = "auto",
        max_model_len: int | None = None,
        memory_share: float | None = None,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency!r}")
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise MissingExtra("vllm", "vllm", "a model named vllm:…") from error
        from transformers import AutoTokenizer

        folder = Path(folder)
        files = check_folder(folder)
        adapter_files: dict[str, str] = {}
        self._merged: tempfile.TemporaryDirectory | None = None
        if adapter is not None:
            self._merged, adapter_files = _merge(folder, Path(adapter))
        # The grammar engine and the compact JSON of `constrained`, so that both engines write the same language.
        options: dict[str, Any] = {"structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True}}
        if max_model_len is not None:
            options["max_model_len"] = max_model_len
        if memory_share is not None:
            options["gpu_memory_utilization"] = memory_share
        source = Path(self._merged.name) if self._merged is not None else folder
        try:
            self._engine = LLM(
                str(source), dtype=dtype, max_num_seqs=concurrency, trust_remote_code=False, seed=0, **options
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise BackboneError(f"vLLM cannot start with {folder}: {str(error)[:500]}") from error
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        self._chats = ChatTokenizer(tokenizer)
        config = self._engine.llm_engine.model_config
        self.window = int(config.max_model_len)
        resolved = str(config.dtype).removeprefix("torch.")
        identity = {"engine": "vllm", "dtype": resolved, "files": files, "adapter": adapter_files}
        self._fingerprint = f"vllm/{resolved}/{sha256_text(canonical_json(identity))}"

    @property
    def fingerprint(self) -> str:
        """Hash over weights, tokenizer, template, adapter and dtype."""
        return self._fingerprint

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every special or added token of the tokenizer, blanks excepted."""
        return self._chats.control_tokens

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Write answers in one engine batch.

        Raises:
            InputError: a prompt fills the window, or the engine refuses a schema.
            BackboneError: the engine ended a request otherwise than by stop or length.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        prompts = [tuple(self._chats.encode_chat(request.messages)) for request in requests]
        parameters = []
        for request, prompt in zip(requests, prompts, strict=True):
            self._check_window(len(prompt), 1)
            schema = StructuredOutputsParams(json=request.schema) if request.schema else None
            parameters.append(
                SamplingParams(
                    max_tokens=min(request.max_tokens, self.window - len(prompt)),
                    temperature=request.temperature,
                    top_p=request.top_p,
                    stop=list(request.stop) or None,
                    seed=request.seed if request.temperature > 0 else None,
                    structured_outputs=schema,
                )
            )
        answers = []
        for prompt, output in zip(prompts, self._run(prompts, parameters), strict=True):
            written = output.outputs[0]
            if written.finish_reason not in ("stop", "length"):
                raise BackboneError(f"vLLM ended a request with {written.finish_reason!r}")
            answers.append(Completion(written.text, len(prompt), len(written.token_ids), written.finish_reason))
        return answers

    def choose(self, choices: Sequence[Choice]) -> list[Chosen]:
        """Log-probability of each option: the sum over its tokens, renormalised over the options."""
        branches = [self._branches(choice.messages, choice.options) for choice in choices]
        answers = []
        for (context, options), log_probs in zip(branches, self._score_branches(branches), strict=True):
            scores = np.array(log_probs)
            normalised = scores - np.logaddexp.reduce(scores)
            answers.append(Chosen(tuple(normalised.tolist()), len(context) + sum(map(len, options))))
        return answers

    def score(self, scorings: Sequence[Scoring]) -> list[Scored]:
        """Summed log-probability (nats) and token count of every continuation."""
        branches = [self._branches(scoring.messages, scoring.continuations) for scoring in scorings]
        answers = []
        for (context, continuations), log_probs in zip(branches, self._score_branches(branches), strict=True):
            n_tokens = tuple(map(len, continuations))
            answers.append(Scored(tuple(log_probs), n_tokens, len(context) + sum(n_tokens)))
        return answers

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Always refused.

        Raises:
            BackboneError: a generating vLLM engine has no embeddings.
        """
        raise BackboneError("vLLM in process does not embed; use minilm, or another embedder, for embeddings")

    def close(self) -> None:
        """Stop the engine and remove the merged copy of the weights."""
        self._engine.llm_engine.engine_core.shutdown()
        if self._merged is not None:
            self._merged.cleanup()

    def _branches(self, messages, texts: tuple[str, ...]) -> Branches:
        context = tuple(self._chats.encode_chat(messages))
        continuations = [tuple(self._chats.encode_text(text)) for text in texts]
        # One more: vLLM always writes a token behind the prompt.
        self._check_window(len(context), max(map(len, continuations)) + 1)
        return context, continuations

    def _check_window(self, context: int, answer: int) -> None:
        if context + answer > self.window:
            raise InputError(
                f"a context of {context} tokens and an answer of {answer} do not fit the model's window of "
                f"{self.window} tokens; shorten the memory or raise max_model_len"
            )

    def _score_branches(self, branches: list[Branches]) -> list[list[float]]:
        from vllm import SamplingParams

        prompts = [context + text for context, texts in branches for text in texts]
        parameters = [SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)] * len(prompts)
        outputs = iter(self._run(prompts, parameters))
        scores = []
        for context, texts in branches:
            sums = []
            for text in texts:
                table = next(outputs).prompt_logprobs
                values = [table[len(context) + place][token].logprob for place, token in enumerate(text)]
                sums.append(float(np.sum(values)))
            scores.append(sums)
        return scores

    def _run(self, prompts: list[tuple[int, ...]], parameters: list[Any]) -> list[Any]:
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        if not prompts:
            return []
        tokens = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        try:
            return self._engine.generate(tokens, parameters, use_tqdm=False)
        except ValueError as error:
            raise InputError(f"vLLM refuses a request: {str(error)[:500]}") from error
        except EngineDeadError as error:
            raise BackboneError(f"the vLLM engine died: {str(error)[:500]}") from error


def _merge(folder: Path, adapter: Path) -> tuple[tempfile.TemporaryDirectory, dict[str, str]]:
    """A temporary copy of the model with the adapter in its weights, and the adapter's hashes."""
    from recollect.backbones.transformers_engine import check_adapter, load_causal_model

    hashes = check_adapter(adapter)
    merged = tempfile.TemporaryDirectory(prefix="recollect-merged-")
    load_causal_model(folder, adapter, "bfloat16").save_pretrained(merged.name)
    for file in folder.iterdir():
        target = Path(merged.name) / file.name
        if file.is_file() and not target.exists() and file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(file, target)
    (Path(merged.name) / "manifest.json").unlink(missing_ok=True)  # it speaks of the unmerged weights
    return merged, hashes
