"""Structured output: what a request asks for (``fields``), as a grammar (``source``, ``tags``, ``tools``), compiled
(``compiler``) for the model's vocabulary (``vocabulary``), followed token by token and made into masks (``matcher``).
"""
