# SPDX-License-Identifier: Apache-2.0
"""OpenAI's protocol: request fields, generation, response bodies and events."""
