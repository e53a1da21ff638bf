# SPDX-License-Identifier: Apache-2.0
"""HTTP itself: listening, limits, keys, the access log. Nothing here knows a protocol's fields."""
