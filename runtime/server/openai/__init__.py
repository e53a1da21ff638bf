"""OpenAI's protocol: request fields, generation, response bodies and events."""
