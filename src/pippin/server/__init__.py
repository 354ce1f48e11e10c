"""The HTTP server: OpenAI's and SGLang's endpoints over one EngineClient."""

from pippin.server.app import create_app
from pippin.server.gate import Gate

__all__ = ["Gate", "create_app"]
