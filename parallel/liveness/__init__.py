# SPDX-License-Identifier: Apache-2.0
"""Whether every rank of the job is alive and makes progress, and a report that names the rank when one does not."""
