# SPDX-License-Identifier: Apache-2.0
"""Both ends of the socket pair that joins the HTTP process to the engine on rank 0."""
