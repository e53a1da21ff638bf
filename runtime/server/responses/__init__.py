# SPDX-License-Identifier: Apache-2.0
"""The text subset of OpenAI's Responses API: ``POST /v1/responses``. Nothing is stored between requests."""
