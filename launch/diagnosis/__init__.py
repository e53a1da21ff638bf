# SPDX-License-Identifier: Apache-2.0
"""What ``launch.doctor`` looks at: this host, its GPUs, and whether the ranks of the job agree."""
