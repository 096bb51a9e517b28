"""LangChain's own standard tests (langchain-tests) over our chat model and embeddings.

What is not supported is declared in the properties LangChain gives for it, and those tests skip with LangChain's own
words: images, audio, PDF (text only); another model per call (a backbone is one model);
serialisation (an opened backbone cannot be rebuilt from JSON); recordings (nothing goes over a network); environment
variables (there are none).
"""

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests
from support.tool_following import tool_following_backbone

from recollect.backbones.scripted import ScriptedBackbone
from recollect.integrations.langchain import RecollectChatModel, RecollectEmbeddings


@pytest.fixture(autouse=True)
def _no_tracing(monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("LANGCHAIN_TRACING_V2", "false")


class _ChatModel:
    @property
    def chat_model_class(self):
        return RecollectChatModel

    @property
    def chat_model_params(self):
        return {"backbone": tool_following_backbone()}

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def supports_model_override(self):
        return False


class TestChatModelUnit(_ChatModel, ChatModelUnitTests):
    pass


class TestChatModelIntegration(_ChatModel, ChatModelIntegrationTests):
    pass


class _Embedder:
    @property
    def embeddings_class(self):
        return RecollectEmbeddings

    @property
    def embedding_model_params(self):
        return {"embedder": ScriptedBackbone()}


class TestEmbeddingsUnit(_Embedder, EmbeddingsUnitTests):
    pass


class TestEmbeddingsIntegration(_Embedder, EmbeddingsIntegrationTests):
    pass
