"""The HTTP server: OpenAI's and SGLang's endpoints over one EngineClient."""

from pippin.server.app import Gate, create_app

__all__ = ["Gate", "create_app"]
