"""Floor 3: HTTP: the OpenAI-shaped API, the proxy, the studio page."""
