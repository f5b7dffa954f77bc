"""A server of OpenAI's Images API, and a web page, for one bundle."""
