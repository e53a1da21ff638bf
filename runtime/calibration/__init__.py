# SPDX-License-Identifier: Apache-2.0
"""What a text tells about the inputs of a model's products, and quantisation that uses it."""
