# SPDX-License-Identifier: Apache-2.0
"""Anthropic's Messages protocol: ``/v1/messages`` and ``/v1/messages/count_tokens``."""
